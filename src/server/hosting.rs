//! The lanes of a server's process: begun with the job, begun anew, and, where shards move, begun and ended as they come and go.
//!
//! Invariant: one lane of a shard at a time; a process whose shards move stays until the launcher says that it may go.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
};

use super::{
    lane::{CommandWakeup, Ended},
    node::{Begins, LaneThread, Plan, Step},
};
use crate::{
    Error, Result,
    session::{Command, Member, Offer, Recorder, Report, ShardShape, Tenure, fabrics, memory_available},
    transport::Waiter,
    types::{Epoch, PeerId, ShardId},
};

/// The lanes of this process, each with a thread of its own.
pub(super) struct Lanes {
    plan: Arc<Plan>,
    cores: Vec<usize>,
    setup: Sender<Step>,
    setups: Receiver<Step>,
    waiter: Waiter,
    /// The lanes that run, and the place of each among the cores.
    running: BTreeMap<u16, usize>,
}

impl Lanes {
    pub fn new(plan: Arc<Plan>, cores: Vec<usize>) -> Result<Lanes> {
        let (setup, setups) = channel();
        Ok(Lanes { plan, cores, setup, setups, waiter: Waiter::new()?, running: BTreeMap::new() })
    }

    /// Begins a lane; where it is sent what others offer it.
    pub fn begin(
        &mut self,
        member: &Member,
        lane: u16,
        begins: Begins,
        recorder: Option<Box<Recorder>>,
    ) -> Result<Sender<Vec<Offer>>> {
        let (offers_out, offers_in) = channel();
        let used: BTreeSet<usize> = self.running.values().copied().collect();
        let place = (0..).find(|place| !used.contains(place)).expect("there are more numbers than lanes");
        let thread = LaneThread {
            plan: self.plan.clone(),
            me: PeerId { rank: member.rank(), lane },
            core: self.cores.get(place.checked_rem(self.cores.len()).unwrap_or(0)).copied(),
            transport: fabrics::open(member, lane, true)?,
            reporter: member.reporter(),
            commands: CommandWakeup(member.commands()?),
            setup: self.setup.clone(),
            wake: self.waiter.handle(),
            recorder,
            begins,
        };
        let name = format!("shard-{}", thread.shard().0);
        let handle = std::thread::Builder::new().name(name).spawn(move || thread.run(&offers_in));
        handle.map_err(|error| Error::os("pthread_create", "a shard's thread", error))?;
        self.running.insert(lane, place);
        Ok(offers_out)
    }

    /// What a lane's thread says next.
    pub fn next(&self) -> Result<Step> {
        // This end holds a sender too: a thread that ends always says so.
        self.setups.recv().map_err(|_| Error::JobFailed("the threads of the shards are gone".into()))
    }

    /// Waits until all lanes have ended; one whose state is of no use begins anew.
    pub fn wait(&mut self, member: &Member) -> Result<()> {
        while !self.running.is_empty() {
            let Step::Ended(lane, outcome) = self.next()? else { continue };
            self.running.remove(&lane);
            if outcome? == Ended::BeginsAnew {
                let _ = self.begin(member, lane, Begins::Again, None)?.send(Vec::new());
            }
        }
        Ok(())
    }

    /// Holds whatever shards are given to this process, and waits until it may go.
    pub fn host(&mut self, member: &Member) -> Result<()> {
        let mut commands = CommandWakeup(member.commands()?);
        let (mut given, mut declined) = (BTreeMap::new(), BTreeMap::new());
        let mut leaves = false;
        loop {
            while let Some(command) = commands.0.poll()? {
                match command {
                    Command::Tenure { shard, tenure } => drop(given.insert(shard, tenure)),
                    Command::Retire | Command::End { .. } | Command::Stop { checkpoint: false, .. } => leaves = true,
                    // What runs ends by these itself, and says why.
                    Command::JobFailed { text } if self.running.is_empty() => return Err(Error::JobFailed(text)),
                    Command::Leave { clock } if self.running.is_empty() => return Err(Error::Preempted { clock }),
                    Command::JobFailed { .. } | Command::Leave { .. } => leaves = true,
                    _ => {}
                }
            }
            loop {
                match self.setups.try_recv() {
                    Ok(Step::Offers(_)) => {}
                    Ok(Step::Ended(lane, outcome)) => {
                        self.running.remove(&lane);
                        if let Ended::Declines(why) = outcome? {
                            decline(member, ShardId(lane), why, &given, &mut declined)?;
                        }
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            if !leaves {
                self.begin_given(member, &given, &mut declined)?;
            } else if self.running.is_empty() {
                return Ok(());
            }
            self.waiter.wait(&mut [&mut commands], None)?;
        }
    }

    /// Begins lanes of the shards that are given to this process.
    fn begin_given(
        &mut self,
        member: &Member,
        given: &BTreeMap<ShardId, Tenure>,
        declined: &mut BTreeMap<ShardId, Epoch>,
    ) -> Result<()> {
        for (shard, tenure) in given {
            let lane = PeerId { rank: member.rank(), lane: shard.0 };
            let is_new = !self.running.contains_key(&lane.lane) && declined.get(shard) != Some(&tenure.epoch);
            if tenure.other != Some(lane) || !is_new {
                continue;
            }
            let bytes = self
                .plan
                .config
                .shard_memory(&ShardShape::of(&self.plan.layout, *shard))?
                .on_host(&self.plan.config.device);
            if let Some(available) = memory_available().filter(|available| *available < bytes) {
                let why = format!("it takes {bytes} bytes of memory, and {available} are available");
                decline(member, *shard, why, given, declined)?;
                continue;
            }
            let _ = self.begin(member, lane.lane, Begins::Under(*tenure), None)?.send(Vec::new());
        }
        Ok(())
    }
}

/// Tells the launcher that a shard cannot be held here; it is not tried again under the same tenure.
fn decline(
    member: &Member,
    shard: ShardId,
    text: String,
    given: &BTreeMap<ShardId, Tenure>,
    declined: &mut BTreeMap<ShardId, Epoch>,
) -> Result<()> {
    declined.extend(given.get(&shard).map(|tenure| (shard, tenure.epoch)));
    member.reporter().report(Report::Declined { shard, text })
}
