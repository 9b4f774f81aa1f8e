//! All hosts of a job: reaching them, dealing ranks to them, signalling ranks wherever they are, and clearing up everywhere.
//!
//! Agents are reached first, all at once; when every one has said hello and found the rendezvous, the ranks are dealt and started.
//!
//! Invariant: no rank is started anywhere before every host can be used; a host that is lost is told by name, once.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, mpsc::Sender},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{
    addresses::{addresses, own_ips},
    cause::Exit,
    crew::Crew,
    directory::JobDirectory,
    hosts::{self, Host},
    job::JobOptions,
    message::{FromAgent, ToAgent},
    pipes::{SharedSink, lock},
    processes::Processes,
    remote::{Remote, RemoteOptions, Word},
    supervisor::Event,
    sweep,
};
use crate::{Error, Result, mem::Topology, session::VERSION, types::Rank, wire::JobToken};

/// How long hosts may take to say hello and to reach the rendezvous.
const HELLO_TIME: Duration = Duration::from_secs(30);

/// One host of the job.
struct Member {
    host: Host,
    /// `None` for this machine.
    remote: Option<Remote>,
    cores: usize,
    /// The rendezvous as it is seen from there.
    rendezvous: Option<SocketAddr>,
    lost: bool,
}

pub(super) struct Fleet {
    mark: String,
    here: Processes,
    sink: SharedSink,
    events: Sender<Event>,
    members: Vec<Member>,
    /// The host of every rank that was started, and how it ended.
    ranks: BTreeMap<Rank, (usize, Option<Exit>)>,
    started: bool,
    /// By when every host must have been reached.
    reach_until: Option<Instant>,
}

impl Fleet {
    pub fn new(mark: String, events: Sender<Event>, sink: SharedSink) -> Fleet {
        let exits = Mutex::new(events.clone());
        let on_exit = Arc::new(move |rank, exit| {
            let _ = exits.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send(Event::Exited(rank, exit));
        });
        let here = Processes::new(mark.clone(), on_exit, Arc::clone(&sink));
        let (members, ranks) = (Vec::new(), BTreeMap::new());
        Fleet { mark, here, sink, events, members, ranks, started: false, reach_until: None }
    }

    /// By what every process of the job on this machine is known.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Begins to reach the hosts; with none but this one, starts the ranks.
    pub fn start(&mut self, options: &JobOptions, context: &Context<'_>) -> Result<()> {
        let named = if options.hosts.is_empty() { vec![Host::here()] } else { options.hosts.clone() };
        let executable = match &options.remote_executable {
            Some(path) => path.to_string_lossy().into_owned(),
            None => options.executable.to_string_lossy().into_owned(),
        };
        let silence = options.config.deadline();
        let remote_options = RemoteOptions { ssh: options.ssh.clone(), executable, silence };
        for (index, host) in named.into_iter().enumerate() {
            let mut member = Member { cores: 0, rendezvous: None, remote: None, lost: false, host };
            if member.host.is_here() {
                member.cores = Topology::discover().cores.len();
            } else {
                let events = Mutex::new(self.events.clone());
                let listener = Arc::new(move |index, word| {
                    let _ =
                        events.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send(Event::Host(index, word));
                });
                let remote = Remote::start(index, &member.host.name, &remote_options, &self.sink, listener)?;
                remote.say(ToAgent::Reach {
                    addresses: addresses(context.listening, options.config.interface.as_deref())?,
                    port: context.listening.ip().is_unspecified().then_some(context.listening.port()),
                });
                member.remote = Some(remote);
                self.reach_until = Some(Instant::now() + HELLO_TIME.min(Duration::from_millis(options.config.join_ms)));
            }
            self.members.push(member);
        }
        self.start_ranks_if_reached(options, context)
    }

    /// A host's agent has said something, or is gone. Gives the rank that has ended, if that is what it was.
    pub fn heard(
        &mut self,
        index: usize,
        word: Word,
        options: &JobOptions,
        context: &Context<'_>,
    ) -> Result<Vec<(Rank, Exit)>> {
        let member = &mut self.members[index];
        let name = &member.host.name;
        let failed = |why: &str| Err(Error::Config(format!("host {name} {why}")));
        match word {
            Word::Agent(FromAgent::Hello { version, .. }) if version != VERSION => failed(&format!(
                "has gradwire {version} and this launcher is {VERSION}; install the same version there, or name its place with \
                 --remote-gradwire"
            )),
            Word::Agent(FromAgent::Hello { cores, .. }) => {
                member.cores = cores;
                Ok(Vec::new())
            }
            Word::Agent(FromAgent::Reached { rendezvous }) => {
                member.rendezvous = Some(rendezvous);
                self.start_ranks_if_reached(options, context).map(|()| Vec::new())
            }
            Word::Agent(FromAgent::Failed { text }) => {
                // It ends what it has started when it is told to clear up.
                let why = failed(&format!("cannot take part: {text}"));
                self.give_up(index);
                why
            }
            Word::Agent(FromAgent::Exited { rank, exit }) => Ok(vec![(rank, exit)]),
            Word::Agent(FromAgent::Gone { left: 1.. }) => failed("has processes of the job that could not be killed"),
            Word::Agent(_) => Ok(Vec::new()),
            Word::Ended(why) => {
                member.lost = true;
                let alive: Vec<Rank> = self.alive().filter(|rank| self.ranks[rank].0 == index).collect();
                self.give_up(index);
                let loses = [Rank::server(0), Rank::worker(0)].into_iter().any(context.may_lose);
                if loses && alive.iter().all(|rank| (context.may_lose)(*rank)) {
                    self.say(&format!("gradwire: host {} {why}", self.members[index].host.name));
                    return Ok(alive.into_iter().map(|rank| (rank, Exit::Code(1))).collect());
                }
                Err(Error::Config(format!("host {} {why}", self.members[index].host.name)))
            }
        }
    }

    /// Nobody will tell how a host's ranks end.
    fn give_up(&mut self, index: usize) {
        let alive = self.ranks.iter_mut().filter(|(_, (host, exit))| *host == index && exit.is_none());
        alive.for_each(|(_, (_, exit))| *exit = Some(Exit::Code(1)));
    }

    /// Says which hosts have not been reached in time.
    pub fn check_reached(&mut self, now: Instant) -> Option<String> {
        let until = self.reach_until.filter(|until| *until <= now && !self.started)?;
        self.reach_until = None;
        let late = |member: &&Member| member.remote.is_some() && member.rendezvous.is_none();
        let names: Vec<&str> = self.members.iter().filter(late).map(|member| member.host.name.as_str()).collect();
        let waited = HELLO_TIME.saturating_sub(until.saturating_duration_since(now)).as_secs();
        Some(format!("nothing was heard from host {} within {waited} s of starting ssh", names.join(", ")))
    }

    /// When `check_reached` is to be asked.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.reach_until.filter(|_| !self.started)
    }

    fn start_ranks_if_reached(&mut self, options: &JobOptions, context: &Context<'_>) -> Result<()> {
        let missing = |member: &Member| member.remote.is_some() && member.rendezvous.is_none();
        if self.started || self.members.iter().any(missing) {
            return Ok(());
        }
        self.started = true;
        let slots = |member: &Member| member.host.slots.map_or(member.cores, usize::from).max(1);
        let hosts: Vec<(&str, usize)> = self.members.iter().map(|m| (m.host.name.as_str(), slots(m))).collect();
        // Without a word about hosts, this one takes whatever there is.
        let oversubscribe = options.oversubscribe || options.hosts.is_empty();
        let placed = hosts::place(&options.config, &options.by_hand, &hosts, options.map_by, oversubscribe)?;
        for (index, ranks) in placed.iter().enumerate() {
            let exit = |rank| options.config.is_vacant(rank).then_some(Exit::Code(0));
            self.ranks.extend(ranks.iter().map(|rank| (*rank, (index, exit(*rank)))));
        }
        // Those far away take longest to begin.
        let (far, near): (Vec<usize>, Vec<usize>) =
            (0..self.members.len()).partition(|index| self.members[*index].remote.is_some());
        for index in far.into_iter().chain(near) {
            self.start_crew(index, placed[index].clone(), options, context)?;
        }
        Ok(())
    }

    fn start_crew(
        &mut self,
        index: usize,
        ranks: Vec<Rank>,
        options: &JobOptions,
        context: &Context<'_>,
    ) -> Result<()> {
        let member = &self.members[index];
        let rendezvous = member.rendezvous.unwrap_or_else(|| self.own_address(context.listening));
        let mut crew = Crew {
            config: options.config.clone(),
            ranks,
            command: options.command.clone(),
            server_command: options.server_command.clone(),
            rendezvous: rendezvous.to_string(),
            map_by: options.map_by,
            bind_to: options.bind_to,
            environment: options.environment.clone(),
            directory: options.working_directory.clone(),
            pass_output: options.passes_output(),
        };
        let Some(remote) = &member.remote else {
            let outcome = self.here.start(&crew, context.directory);
            // Those that were not started will not end either.
            let missing = crew.ranks.iter().filter(|rank| !self.here.alive().any(|alive| alive == **rank));
            self.ranks.extend(missing.map(|rank| (*rank, (index, Some(Exit::Code(1))))));
            return outcome;
        };
        if let Some(path) = &options.remote_executable
            && crew.server_command.first().is_some_and(|program| *program == *options.executable)
        {
            crew.server_command[0] = path.into();
        }
        if crew.directory.is_none() {
            crew.directory =
                Some(std::env::current_dir().map_err(|e| Error::os("getcwd", "the launcher's directory", e))?);
        }
        crew.pass_output = false;
        let name = format!("{:.56}.h{index}", options.config.name);
        remote.say(ToAgent::Start {
            crew: Box::new(crew),
            token: context.token.to_hex(),
            name,
            mark: format!("{}.h{index}", self.mark),
            home: options.home.clone(),
            silence_ms: options.config.deadline_ms,
        });
        Ok(())
    }

    /// The rendezvous as ranks of this machine call it: with other hosts about, by an address that those can call too, since a rank
    /// listens where it calls from.
    fn own_address(&self, listening: SocketAddr) -> SocketAddr {
        if !listening.ip().is_unspecified() {
            return listening;
        }
        let own = own_ips(None).unwrap_or_default();
        let seen: Vec<IpAddr> = self.members.iter().filter_map(|member| Some(member.rendezvous?.ip())).collect();
        // Whoever has us listen everywhere, and names no hosts, starts ranks elsewhere by other means.
        let abroad = seen.is_empty() || seen.iter().any(|ip| !ip.is_loopback());
        let shared = seen.iter().find(|ip| own.contains(ip)).or(own.first()).filter(|_| abroad);
        SocketAddr::new(shared.copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), listening.port())
    }

    /// A rank's process has ended.
    pub fn reap(&mut self, rank: Rank, exit: Exit) {
        self.here.reap(rank, exit);
        if let Some((_, ended)) = self.ranks.get_mut(&rank) {
            *ended = Some(exit);
        }
    }

    /// Whether we have started this rank's process.
    pub fn has_started(&self, rank: Rank) -> bool {
        self.ranks.contains_key(&rank)
    }

    /// Why a rank whose process has ended cannot be started again from here.
    pub fn hindrance(&self, rank: Rank) -> Option<&'static str> {
        match self.ranks.get(&rank) {
            None => Some("it was started by somebody else"),
            Some((host, _)) => self.members[*host].lost.then_some("its host is gone"),
        }
    }

    /// Starts a rank, where its process ran that has ended, or where it was to run if the job began without it; a worker that has had none
    /// where there are fewest.
    ///
    /// # Errors
    ///
    /// What kept it from starting here; an agent tells its own later.
    pub fn restart(&mut self, rank: Rank, context: &Context<'_>) -> Result<()> {
        let fewest = || {
            let workers = |host: &usize| {
                let on_it = |(other, (at, _)): &(&Rank, &(usize, _))| other.role == rank.role && at == host;
                self.ranks.iter().filter(on_it).count()
            };
            (0..self.members.len()).filter(|host| !self.members[*host].lost).min_by_key(workers)
        };
        let Some(host) = self.ranks.get(&rank).map(|(host, _)| *host).or_else(fewest) else { return Ok(()) };
        let (host, exit) = self.ranks.entry(rank).or_insert((host, None));
        match &self.members[*host].remote {
            Some(remote) => remote.say(ToAgent::Restart { rank }),
            None => self.here.restart(rank, context.directory)?,
        }
        *exit = None;
        Ok(())
    }

    /// How a rank's process ended, if it has.
    pub fn exit(&self, rank: Rank) -> Option<Exit> {
        self.ranks.get(&rank)?.1
    }

    pub fn alive(&self) -> impl Iterator<Item = Rank> + '_ {
        self.ranks.iter().filter(|(_, (_, exit))| exit.is_none()).map(|(rank, _)| *rank)
    }

    pub fn all_exited(&self) -> bool {
        self.alive().next().is_none()
    }

    pub fn signal(&self, rank: Rank, signal: Signal) {
        match self.ranks.get(&rank).and_then(|(host, _)| self.members[*host].remote.as_ref()) {
            Some(remote) => remote.say(ToAgent::Signal { rank, signal: signal as i32 }),
            None => self.here.signal(rank, signal),
        }
    }

    pub fn signal_all(&self, signal: Signal) {
        self.alive().for_each(|rank| self.signal(rank, signal));
    }

    /// Prints a line of the launcher's own, beside the ranks' errors.
    pub fn say(&self, text: &str) {
        lock(&self.sink).say(text);
    }

    /// Leaves nothing behind on any host; gives how many processes of this machine could not be killed.
    pub fn clear_up(&mut self, time: Duration) -> usize {
        self.here.signal_all(Signal::SIGKILL);
        self.members.iter().filter_map(|member| member.remote.as_ref()).for_each(|remote| remote.say(ToAgent::End));
        let left = sweep::sweep(&self.mark, time);
        // An agent sweeps as long as we do, and then has to say so.
        let until = Instant::now() + time + Duration::from_secs(2);
        for member in &mut self.members {
            let lost = member.lost;
            if let Some(remote) = &mut member.remote {
                remote.end(if lost { Instant::now() } else { until });
            }
        }
        self.here.finish_output();
        left
    }
}

/// What a fleet needs to know of its job beside the options.
pub(super) struct Context<'a> {
    pub directory: &'a JobDirectory,
    pub token: &'a JobToken,
    /// Where the rendezvous listens.
    pub listening: SocketAddr,
    /// Whether the job goes on without this rank.
    pub may_lose: fn(Rank) -> bool,
}
