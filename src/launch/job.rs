//! A job as its user holds it: started with options, waited for, signalled, and told apart by how it ended.
//!
//! Invariant: dropping a `Job` ends it; no process of it is left when the drop returns.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use super::{
    checkpoints,
    directory::JobDirectory,
    hosts::{BindTo, Host, MapBy},
    output::{Files, Printer},
    pipes::SharedSink,
    supervisor::{Event, Supervisor},
};
use crate::{
    Error, Result,
    session::{
        Address, CheckpointSink, Control, ControlAnswer, EtcdStore, JobConfig, MetricsEndpoint, Order, Rendezvous,
        RendezvousOptions, StepRange, StoreChoice, TenureStore, control, launcher_text,
    },
    types::Rank,
    wire::JobToken,
};

/// How long the rendezvous may take to say how things stand.
const METRICS_TIME: Duration = Duration::from_secs(5);

/// Where the ranks' output goes.
#[derive(Clone, Debug)]
pub enum OutputTo {
    /// This process' own standard streams.
    Inherit,
    /// A text that [`Job::output`] gives.
    Collect,
    /// Two files for each rank in this directory: `w0.out`, `w0.err`.
    Files(PathBuf),
    /// Ranks on this machine write to this process' streams themselves, with nothing before their lines.
    Pass,
}

/// What a job is started with.
pub struct JobOptions {
    /// The job's settings; its instance is drawn anew.
    pub config: JobConfig,
    /// The workers' command.
    pub command: Vec<OsString>,
    /// The gradwire executable, which the keeper runs.
    pub executable: PathBuf,
    /// The servers' command, to which `--role server --rank N --rendezvous ADDRESS` is added.
    pub server_command: Vec<OsString>,
    /// Ranks that somebody starts by hand.
    pub by_hand: BTreeSet<Rank>,
    /// Where the rendezvous listens; port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// The hosts; without any, this machine takes all ranks.
    pub hosts: Vec<Host>,
    /// How workers go to hosts and to parts of them.
    pub map_by: MapBy,
    /// What workers may run on.
    pub bind_to: BindTo,
    /// Whether hosts take more workers than they have slots.
    pub oversubscribe: bool,
    /// The command that reaches another host, with its options; the host and what it is to run are added.
    pub ssh: Vec<String>,
    /// gradwire on other hosts, where it is not at the place of `executable`.
    pub remote_executable: Option<PathBuf>,
    /// Variables that every rank gets; on other hosts a rank has no others from here.
    pub environment: Vec<(String, String)>,
    /// Where ranks run; on other hosts, where nothing is said, in the directory of this name.
    pub working_directory: Option<PathBuf>,
    /// The job's token; drawn if none is given.
    pub token: Option<JobToken>,
    /// Where output goes.
    pub output: OutputTo,
    /// Where the job's directory is made, if not in the usual place.
    pub home: Option<PathBuf>,
    /// Where the timeline goes when the job has ended; which steps it shows is a setting of the job.
    pub timeline: Option<PathBuf>,
    /// How long a rank that was told to end may take before it is killed.
    pub grace: Duration,
    /// Writes the manifest of a checkpoint whose parts are all on the disk; `None`: as the checkpoint module does.
    pub on_checkpoint: Option<CheckpointSink>,
}

impl JobOptions {
    /// A job of these settings whose workers run this command; servers run `executable node`, the gradwire program.
    pub fn new(config: JobConfig, command: Vec<OsString>, executable: impl Into<PathBuf>) -> JobOptions {
        let executable = executable.into();
        JobOptions {
            config,
            command,
            server_command: vec![executable.clone().into(), "node".into()],
            executable,
            by_hand: BTreeSet::new(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            hosts: Vec::new(),
            map_by: MapBy::Slot,
            bind_to: BindTo::None,
            oversubscribe: false,
            ssh: vec!["ssh".into()],
            remote_executable: None,
            environment: Vec::new(),
            working_directory: None,
            token: None,
            output: OutputTo::Inherit,
            home: None,
            timeline: None,
            grace: Duration::from_secs(3),
            on_checkpoint: None,
        }
    }
}

/// What a user of the launcher can send to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// End at once (SIGINT).
    Interrupt,
    /// End with a checkpoint at the next clock (SIGTERM, SIGUSR1); a second one ends the job without it. The number is passed on
    /// to the ranks where no checkpoint can be written.
    Preempt(i32),
}

/// How a job has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// What the launcher exits with.
    pub code: u8,
    /// Why the job failed or ended early; `None` if it went well.
    pub reason: Option<String>,
    /// The clock of the last complete checkpoint.
    pub checkpoint: Option<u64>,
    /// How many paths each fabric carried.
    pub paths: BTreeMap<String, usize>,
    /// Clocks at which a gradient was not finite, and what was said of the last; looked at where norms are measured.
    pub not_finite: (u64, Option<String>),
    /// Workers that were lost and have not come again, each with the clock from which on it was out.
    pub missing: BTreeMap<Rank, u64>,
    /// What ranks said when they had finished.
    pub summaries: BTreeMap<Rank, serde_json::Value>,
}

/// A running job.
pub struct Job {
    path: PathBuf,
    address: Address,
    listening: SocketAddr,
    token: JobToken,
    events: Sender<Event>,
    outcomes: Receiver<Outcome>,
    outcome: Option<Outcome>,
    collected: Collected,
    thread: Option<JoinHandle<()>>,
    /// Open as long as the job has a handle.
    _metrics: Option<MetricsEndpoint>,
}

/// Output that is kept instead of printed.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Job {
    /// Starts a job: its directory, its rendezvous, its servers and its workers.
    pub fn start(mut options: JobOptions) -> Result<Job> {
        options.config.instance = u64::from_le_bytes(crate::wire::random_bytes()?);
        options.config.validate()?;
        if options.command.is_empty() && options.config.ranks().any(|rank| options.starts_worker(rank)) {
            return Err(Error::Config("no command for the workers: give it after `--`".into()));
        }
        if options.timeline.is_some() {
            options.config.timeline.get_or_insert(StepRange::ALL);
        }
        checkpoints::prepare(&mut options.config)?;
        let on_checkpoint = options.on_checkpoint.take().unwrap_or_else(|| checkpoints::recorder(&options.config));
        let token = match options.token.take() {
            Some(token) => token,
            None => JobToken::random()?,
        };
        let directory = JobDirectory::create(options.home.as_deref(), &options.config.name)?;
        let (events, events_in) = channel();
        let tenures = options.config.has_tenures().then(|| store(&options.config, &directory)).transpose()?;
        let for_notices = events.clone();
        let rendezvous = Rendezvous::start(
            options.config.clone(),
            token.clone(),
            RendezvousOptions {
                listen: options.listens_on(),
                reserved: options.config.ranks().filter(|rank| !options.by_hand.contains(rank)).collect(),
                on_notice: Box::new(move |notice| drop(for_notices.send(Event::Notice(notice)))),
                on_checkpoint,
                tenures,
            },
        )?;
        let (address, listening) = (rendezvous.address(), rendezvous.listening());
        let metrics = serve_metrics(&options.config, &address, &token, &rendezvous)?;
        directory.describe(&address, &token, &options.config)?;
        let path = directory.path().to_path_buf();
        let collected = Collected::default();
        let sink: SharedSink = match &options.output {
            OutputTo::Inherit | OutputTo::Pass => Arc::new(Mutex::new(Printer::inherit())),
            OutputTo::Collect => {
                Arc::new(Mutex::new(Printer::plain(Box::new(collected.clone()), Box::new(collected.clone()))))
            }
            OutputTo::Files(directory) => Arc::new(Mutex::new(Files::new(directory.clone())?)),
        };
        let (outcome_out, outcomes) = channel();
        let (for_thread, its_token) = (events.clone(), token.clone());
        // Children are killed when the thread that started them ends; so one thread starts them and sees the job to its end.
        let thread = std::thread::Builder::new()
            .name("supervisor".into())
            .spawn(move || {
                let supervisor =
                    Supervisor::new(options, directory, (rendezvous, its_token), (for_thread, events_in), sink);
                let _ = outcome_out.send(supervisor.run());
            })
            .map_err(|e| Error::os("pthread_create", "the supervisor", e))?;
        Ok(Job {
            path,
            address,
            listening,
            token,
            events,
            outcomes,
            outcome: None,
            collected,
            thread: Some(thread),
            _metrics: metrics,
        })
    }

    /// The job's directory.
    pub fn directory(&self) -> &Path {
        &self.path
    }

    /// Where its rendezvous listens.
    pub fn listening(&self) -> SocketAddr {
        self.listening
    }

    /// Where its rendezvous is, as seen from this machine.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its token.
    pub fn token(&self) -> &JobToken {
        &self.token
    }

    /// A handle by which another thread can signal the job.
    pub fn signaller(&self) -> impl Fn(Signal) + Send + use<> {
        let events = self.events.clone();
        move |signal| drop(events.send(Event::Signal(signal)))
    }

    /// Sends a signal to the job.
    pub fn signal(&self, signal: Signal) {
        self.signaller()(signal);
    }

    /// Sends a signal of the operating system to one rank's process.
    pub fn kill(&self, rank: Rank, signal: nix::sys::signal::Signal) {
        let _ = self.events.send(Event::Kill(rank, signal));
    }

    /// What the ranks have written so far, if it is collected.
    pub fn output(&self) -> String {
        let bytes = self.collected.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for the job's end, at most this long.
    pub fn wait_for(&mut self, time: Duration) -> Option<Outcome> {
        if self.outcome.is_none() {
            self.outcome = match self.outcomes.recv_timeout(time) {
                Ok(outcome) => Some(outcome),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => unreachable!("the supervisor always leaves an outcome"),
            };
        }
        self.outcome.clone()
    }

    /// Waits for the job's end.
    pub fn wait(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.wait_for(Duration::from_secs(3600)) {
                return outcome;
            }
        }
    }
}

/// Where it is written down who serves each shard.
fn store(config: &JobConfig, directory: &JobDirectory) -> Result<Box<dyn TenureStore>> {
    Ok(match &config.store {
        StoreChoice::Embedded => Box::new(directory.tenures()?),
        StoreChoice::Etcd(members) => Box::new(EtcdStore::open(members, &config.name, config.instance)?),
    })
}

/// The launcher's own metrics: what its rendezvous says of the job whenever somebody asks.
fn serve_metrics(
    config: &JobConfig,
    address: &Address,
    token: &JobToken,
    rendezvous: &Rendezvous,
) -> Result<Option<MetricsEndpoint>> {
    let Some(wanted) = config.metrics else { return Ok(None) };
    let (own, address, token) = (config.clone(), address.clone(), token.clone());
    let text = move || match control(&address, &token, Control::Status, METRICS_TIME) {
        Ok(ControlAnswer::Status(status)) => launcher_text(&own, Some(*status)),
        _ => launcher_text(&own, None),
    };
    let endpoint = MetricsEndpoint::start(wanted.of(None, config)?, text)?;
    rendezvous.order(Order::MetricsAt(endpoint.address()));
    Ok(Some(endpoint))
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Signal(Signal::Interrupt));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl JobOptions {
    /// Whether ranks of this machine write to its streams themselves.
    pub(super) fn passes_output(&self) -> bool {
        matches!(self.output, OutputTo::Pass)
    }

    /// Where the rendezvous listens: for other hosts on every address, unless one was given.
    fn listens_on(&self) -> SocketAddr {
        let abroad = self.hosts.iter().any(|host| !host.is_here());
        if abroad && self.listen.ip().is_loopback() {
            return SocketAddr::from(([0, 0, 0, 0], self.listen.port()));
        }
        self.listen
    }

    fn starts_worker(&self, rank: Rank) -> bool {
        rank.role == crate::types::Role::Worker && !self.by_hand.contains(&rank)
    }
}
