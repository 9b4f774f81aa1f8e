//! The endpoint of a process' metrics: a port at which Prometheus asks, and the text that it gets.
//!
//! Invariant: whoever asks reads numbers and changes none; the thread that answers touches no data path, and a name, a unit and a
//! meaning are written down once, here.
#![forbid(unsafe_code)]

use std::{
    fmt,
    net::SocketAddr,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, text::encode},
    metrics::{MetricType, exemplar::Exemplar},
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use tiny_http::{Header, Response, Server};

use super::{JobConfig, Status};
use crate::{
    Error, Result,
    mem::Owner,
    observe::{BUCKETS, Cause, Histogram, LaneMeter, Meters, PeerMeter, Queue, TaskKind, Usage, bucket_ns},
    types::{Rank, Role},
};

/// How often the endpoint's thread looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The media type of the OpenMetrics text format.
const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where the processes of a job answer: an address and a port, or an address alone. With a port P the launcher is at P, the servers
/// at the ports after it and the workers at those after the servers; with port 0, or none, the kernel chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MetricsAddress(SocketAddr);

impl FromStr for MetricsAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<MetricsAddress> {
        let alone = || Some(SocketAddr::new(text.trim().parse().ok()?, 0));
        text.trim().parse().ok().or_else(alone).map(MetricsAddress).ok_or_else(|| {
            Error::Config(format!(
                "`{text}` is no address for metrics: write 127.0.0.1:9400, or 127.0.0.1 for any port"
            ))
        })
    }
}

impl TryFrom<String> for MetricsAddress {
    type Error = Error;

    fn try_from(text: String) -> Result<MetricsAddress> {
        text.parse()
    }
}

impl From<MetricsAddress> for String {
    fn from(address: MetricsAddress) -> String {
        address.0.to_string()
    }
}

impl MetricsAddress {
    /// Where the launcher (`None`) or a rank of the job is to answer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where there are fewer ports left than processes.
    pub fn of(self, rank: Option<Rank>, config: &JobConfig) -> Result<SocketAddr> {
        let place = match rank {
            None => 0,
            Some(Rank { role: Role::Server, index }) => 1 + u32::from(index),
            Some(Rank { role: Role::Worker, index }) => 1 + u32::from(config.servers) + u32::from(index),
        };
        let mut address = self.0;
        if address.port() != 0 {
            let port = u16::try_from(u32::from(address.port()) + place).map_err(|_| {
                Error::Config(format!("`metrics` is {address}: {} ports follow, and the job has more processes", {
                    u16::MAX - address.port()
                }))
            })?;
            address.set_port(port);
        }
        Ok(address)
    }
}

/// A port at which a process' metrics are read. Dropping it closes the port.
pub struct MetricsEndpoint {
    address: SocketAddr,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    owner: Owner,
}

impl fmt::Debug for MetricsEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MetricsEndpoint").field(&self.address).finish()
    }
}

impl MetricsEndpoint {
    /// Answers at `address` with what `text` gives.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the address cannot be had.
    pub fn start(address: SocketAddr, text: impl Fn() -> String + Send + 'static) -> Result<MetricsEndpoint> {
        let refused = |why: String| {
            Error::Config(format!("metrics cannot be served at {address}: {why}; choose another with --metrics"))
        };
        let server = Server::http(address).map_err(|error| refused(error.to_string()))?;
        let address = server.server_addr().to_ip().ok_or_else(|| refused("it is no IP address".into()))?;
        let ending = Arc::new(AtomicBool::new(false));
        let told = ending.clone();
        let serve = move || {
            while !told.load(Ordering::Relaxed) {
                let Ok(Some(request)) = server.recv_timeout(LOOK_EVERY) else { continue };
                let known = matches!(request.url().split('?').next(), Some("/" | "/metrics"));
                let media = Header::from_bytes("Content-Type", MEDIA_TYPE).expect("both are ASCII");
                // Whoever hangs up in the middle asks again.
                let _ = match known {
                    true => request.respond(Response::from_string(text()).with_header(media)),
                    false => request.respond(Response::from_string("metrics are at /metrics\n").with_status_code(404)),
                };
            }
        };
        let thread = std::thread::Builder::new().name("metrics".into()).spawn(serve);
        let thread = thread.map_err(|error| Error::os("pthread_create", "the metrics' thread", error))?;
        Ok(MetricsEndpoint { address, ending, thread: Some(thread), owner: Owner::here() })
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsEndpoint {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            // A copy that fork has made: there is no such thread here.
            return std::mem::forget(self.thread.take());
        }
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The text of a rank's metrics.
pub fn rank_text(config: &JobConfig, rank: Rank, meters: Arc<Meters>) -> String {
    text(config, &rank.to_string(), RankMetrics { rank, meters })
}

/// The text of the launcher's metrics.
pub fn launcher_text(config: &JobConfig, status: Option<Status>) -> String {
    text(config, "launcher", LauncherMetrics(status))
}

fn text(config: &JobConfig, who: &str, collector: impl Collector) -> String {
    // Prometheus has a label `job` of its own.
    let labels = [("run".into(), config.name.clone().into()), ("rank".into(), who.to_string().into())];
    let mut registry = Registry::with_labels(labels.into_iter());
    registry.register_collector(Box::new(collector));
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing into a string does not fail");
    text
}

type Encoded = std::result::Result<(), fmt::Error>;
type NoExemplar = Option<&'static Exemplar<Vec<(String, String)>, f64>>;

/// Writes one family: its labels and values.
struct Family<'a>(prometheus_client::encoding::MetricEncoder<'a>);

impl Family<'_> {
    fn counter(&mut self, labels: &impl EncodeLabelSet, value: f64) -> Encoded {
        self.0.encode_family(labels)?.encode_counter(&value, None as NoExemplar)
    }

    fn gauge(&mut self, labels: &impl EncodeLabelSet, value: f64) -> Encoded {
        self.0.encode_family(labels)?.encode_gauge(&value)
    }

    fn histogram(&mut self, labels: &impl EncodeLabelSet, histogram: &Histogram) -> Encoded {
        let counts = histogram.counts();
        let bound = |index| if index + 1 < BUCKETS { bucket_ns(index) as f64 / 1e9 } else { f64::INFINITY };
        let buckets: Vec<(f64, u64)> = counts.iter().enumerate().map(|(index, count)| (bound(index), *count)).collect();
        let mut family = self.0.encode_family(labels)?;
        family.encode_histogram::<Vec<(String, String)>>(histogram.sum_s(), counts.iter().sum(), &buckets, None)
    }
}

/// Families of one encoder.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn family(
        &mut self,
        kind: MetricType,
        name: &str,
        help: &str,
        fill: impl FnOnce(&mut Family<'_>) -> Encoded,
    ) -> Encoded {
        fill(&mut Family(self.0.encode_descriptor(name, help, None, kind)?))
    }
}

#[derive(Debug)]
struct RankMetrics {
    rank: Rank,
    meters: Arc<Meters>,
}

type Path = (String, Arc<PeerMeter>);

impl RankMetrics {
    fn paths(&self) -> Vec<Path> {
        let lanes = self.meters.lanes();
        lanes.iter().flat_map(|lane| lane.peers().into_iter().map(|peer| (lane.lane.to_string(), peer))).collect()
    }

    fn traffic(paths: &[Path], out: &mut Writer<'_>) -> Encoded {
        let both = |family: &mut Family<'_>, of: fn(&PeerMeter) -> [u64; 2]| {
            paths.iter().try_for_each(|(lane, path)| {
                let labels = path_labels(lane, path);
                ["sent", "received"].into_iter().zip(of(path)).try_for_each(|(direction, value)| {
                    family.counter(&with(&labels, ("direction", direction)), value as f64)
                })
            })
        };
        let help = "Payload bytes of gradients and parameters on a path, without headers.";
        out.family(MetricType::Counter, "gradwire_payload_bytes", help, |family| {
            both(family, |path| [path.sent_bytes.value(), path.received_bytes.value()])
        })?;
        out.family(MetricType::Counter, "gradwire_chunks", "Chunks on a path: writes with a payload.", |family| {
            both(family, |path| [path.sent_chunks.value(), path.received_chunks.value()])
        })
    }

    fn state_of_paths(paths: &[Path], out: &mut Writer<'_>) -> Encoded {
        let each = |family: &mut Family<'_>, of: fn(&PeerMeter) -> u64, counts: bool| {
            paths.iter().try_for_each(|(lane, path)| {
                let (labels, value) = (path_labels(lane, path), of(path) as f64);
                if counts { family.counter(&labels, value) } else { family.gauge(&labels, value) }
            })
        };
        let help = "Times that a path broke and was built again.";
        out.family(MetricType::Counter, "gradwire_path_rebuilds", help, |family| {
            each(family, |path| path.rebuilds.value(), true)
        })?;
        let help = "Writes of a worker that were sent again over a path that was built again.";
        out.family(MetricType::Counter, "gradwire_resent_writes", help, |family| {
            each(family, |path| path.resent.value(), true)
        })?;
        let help = "1 if the job would rather have a better fabric for the path, else 0.";
        out.family(MetricType::Gauge, "gradwire_path_fallback", help, |family| {
            each(family, |path| path.fallback.value(), false)
        })?;
        let help = "Positions of the window that the worker at one end of the path may still push.";
        out.family(MetricType::Gauge, "gradwire_credit_positions", help, |family| {
            each(family, |path| path.credit.value(), false)
        })?;
        let help = "Time with nothing to do until something came, by whom it came from and what it was: a shard's idle time, \
                    a worker's while its program waits.";
        out.family(MetricType::Histogram, "gradwire_wait_seconds", help, |family| {
            paths.iter().try_for_each(|(lane, path)| {
                Cause::ALL.into_iter().zip(&path.waits).try_for_each(|(cause, waits)| {
                    family.histogram(&with(&path_labels(lane, path), ("cause", cause.name())), waits)
                })
            })
        })
    }

    fn work(&self, lanes: &[Arc<LaneMeter>], out: &mut Writer<'_>) -> Encoded {
        let is_server = self.rank.role == Role::Server;
        let each = |family: &mut Family<'_>, of: &dyn Fn(&LaneMeter) -> f64| {
            lanes.iter().try_for_each(|lane| family.gauge(&[("lane", lane.lane.to_string())], of(lane)))
        };
        let help = "Clocks (steps) done: of a shard those that are applied on all its chunks, of a worker those it has waited for.";
        out.family(MetricType::Gauge, "gradwire_clock", help, |family| {
            each(family, &|lane| lane.clock.value() as f64)
        })?;
        out.family(MetricType::Gauge, "gradwire_queue_depth", "What waits its turn in this process.", |family| {
            lanes.iter().try_for_each(|lane| {
                let served = |queue: &Queue| (*queue == Queue::Turns) != is_server || *queue == Queue::Posts;
                let worker_has = |queue: &Queue| is_server || matches!(queue, Queue::Posts | Queue::Turns);
                Queue::ALL.into_iter().filter(served).filter(worker_has).try_for_each(|queue| {
                    let labels = [("lane", lane.lane.to_string()), ("queue", queue.name().into())];
                    family.gauge(&labels, lane.queue(queue).value() as f64)
                })
            })
        })?;
        if !is_server {
            let help = "How long the program waited at the end of each clock.";
            return out.family(MetricType::Histogram, "gradwire_program_wait_seconds", help, |family| {
                lanes.iter().try_for_each(|lane| family.histogram(&[("lane", lane.lane.to_string())], &lane.program))
            });
        }
        let help = "How many clocks the furthest worker is ahead of the slowest.";
        out.family(MetricType::Gauge, "gradwire_staleness_clocks", help, |family| {
            each(family, &|lane| lane.staleness.value() as f64)
        })?;
        let help = "Steps that were skipped because a gradient was not finite.";
        out.family(MetricType::Counter, "gradwire_skipped_steps", help, |family| {
            lanes
                .iter()
                .try_for_each(|lane| family.counter(&[("lane", lane.lane.to_string())], lane.skipped.value() as f64))
        })?;
        let help = "The factor on the loss of the next step; 1 where there is none.";
        out.family(MetricType::Gauge, "gradwire_loss_scale", help, |family| {
            each(family, &|lane| f32::from_bits(lane.loss_scale.value() as u32).into())
        })?;
        let tasks = |family: &mut Family<'_>, of: &dyn Fn(&LaneMeter, usize) -> f64| {
            lanes.iter().try_for_each(|lane| {
                TaskKind::ALL.into_iter().enumerate().try_for_each(|(number, task)| {
                    family.counter(&[("lane", lane.lane.to_string()), ("task", task.name().into())], of(lane, number))
                })
            })
        };
        let help = "Time of the optimizer and of the sums before it; on a GPU from a job's start to its end.";
        out.family(MetricType::Counter, "gradwire_compute_seconds", help, |family| {
            tasks(family, &|lane, task| lane.computing_ns[task].value() as f64 / 1e9)
        })?;
        out.family(
            MetricType::Counter,
            "gradwire_computations",
            "Computations over a chunk that have ended.",
            |family| tasks(family, &|lane, task| lane.computations[task].value() as f64),
        )
    }

    fn process(&self, out: &mut Writer<'_>) -> Encoded {
        let help = "Memory allocated for data, by kind.";
        out.family(MetricType::Gauge, "gradwire_memory_bytes", help, |family| {
            let mut kinds = self.meters.memory().into_iter();
            kinds.try_for_each(|(kind, bytes)| family.gauge(&[("kind", kind)], bytes as f64))
        })?;
        let (used, none) = (Usage::now(), Vec::<(String, String)>::new());
        let help = "Processor time of the process, in user and in kernel mode.";
        out.family(MetricType::Counter, "gradwire_cpu_seconds", help, |family| {
            family.counter(&none, used.cpu_ns as f64 / 1e9)
        })?;
        let help = "Bytes that a processor has copied to move them.";
        out.family(MetricType::Counter, "gradwire_copied_bytes", help, |family| {
            family.counter(&none, used.copied_bytes as f64)
        })
    }
}

impl Collector for RankMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Encoded {
        let (mut out, paths) = (Writer(encoder), self.paths());
        RankMetrics::traffic(&paths, &mut out)?;
        RankMetrics::state_of_paths(&paths, &mut out)?;
        self.work(&self.meters.lanes(), &mut out)?;
        self.process(&mut out)
    }
}

fn path_labels(lane: &str, path: &PeerMeter) -> Vec<(&'static str, String)> {
    vec![("lane", lane.into()), ("peer", path.peer.to_string()), ("fabric", path.fabric.into())]
}

fn with(labels: &[(&'static str, String)], more: (&'static str, &str)) -> Vec<(&'static str, String)> {
    labels.iter().cloned().chain([(more.0, more.1.to_string())]).collect()
}

/// What the launcher knows; `None` if its rendezvous did not answer.
#[derive(Debug)]
struct LauncherMetrics(Option<Status>);

impl Collector for LauncherMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Encoded {
        let Some(status) = &self.0 else { return Ok(()) };
        let (mut out, none) = (Writer(encoder), Vec::<(String, String)>::new());
        out.family(MetricType::Gauge, "gradwire_ranks", "Ranks of the job, by state.", |family| {
            let mut states: Vec<&str> = status.ranks.iter().map(|rank| rank.state.as_str()).collect();
            states.sort_unstable();
            states.chunk_by(|a, b| a == b).try_for_each(|some| family.gauge(&[("state", some[0])], some.len() as f64))
        })?;
        out.family(MetricType::Gauge, "gradwire_rank_clock", "The last clock that a rank has reported.", |family| {
            let known = status.ranks.iter().filter_map(|rank| Some((rank.rank.to_string(), rank.clock?)));
            known.into_iter().try_for_each(|(rank, clock)| family.gauge(&[("of", rank)], clock as f64))
        })?;
        let help = "The clock of the last complete checkpoint; absent before there is one.";
        out.family(MetricType::Gauge, "gradwire_checkpoint_clock", help, |family| {
            status.checkpoint.map_or(Ok(()), |clock| family.gauge(&none, clock as f64))
        })?;
        let help = "Clocks at which a gradient was not finite.";
        out.family(MetricType::Counter, "gradwire_nonfinite_clocks", help, |family| {
            family.counter(&none, status.not_finite as f64)
        })?;
        let help =
            "How long the ranks that keep the job waiting have been waited for; 0 if nobody is waited for overlong.";
        out.family(MetricType::Gauge, "gradwire_waited_for_seconds", help, |family| {
            let Some(verdict) = &status.verdict else { return family.gauge(&[("of", "nobody")], 0.0) };
            let names = super::verdict::names(&verdict.ranks);
            family.gauge(&[("of", names)], verdict.since_ms as f64 / 1e3)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PeerId;

    #[test]
    fn a_rank_tells_its_numbers_in_openmetrics() {
        let meters = Arc::new(Meters::default());
        let lane = meters.lane(1);
        let path = lane.peer(PeerId::worker(3), "tcp");
        path.sent_bytes.add(4096);
        path.waits[Cause::Push as usize].add(Duration::from_millis(3));
        lane.computing_ns[TaskKind::Step as usize].add(1_500_000_000);
        meters.add_memory("master", 64);
        let config = JobConfig { name: "trial".into(), ..JobConfig::default() };
        let text = rank_text(&config, Rank::server(2), meters);
        let who = "run=\"trial\",rank=\"server 2\"";
        let path = "lane=\"1\",peer=\"worker 3\",fabric=\"tcp\"";
        for line in [
            &format!("gradwire_payload_bytes_total{{{who},{path},direction=\"sent\"}} 4096.0"),
            &format!("gradwire_wait_seconds_bucket{{{who},le=\"0.001024\",{path},cause=\"push\"}} 0"),
            &format!("gradwire_wait_seconds_bucket{{{who},le=\"0.004096\",{path},cause=\"push\"}} 1"),
            &format!("gradwire_wait_seconds_sum{{{who},{path},cause=\"push\"}} 0.003"),
            "gradwire_compute_seconds_total{run=\"trial\",rank=\"server 2\",lane=\"1\",task=\"step\"} 1.5",
            "gradwire_memory_bytes{run=\"trial\",rank=\"server 2\",kind=\"master\"} 64.0",
            "# TYPE gradwire_wait_seconds histogram",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
    }

    #[test]
    fn ports_follow_one_another_and_port_0_is_any() {
        let config = JobConfig { servers: 2, workers: 2, ..JobConfig::default() };
        let address: MetricsAddress = "127.0.0.1:9400".parse().unwrap();
        let ports = [None, Some(Rank::server(1)), Some(Rank::worker(0))].map(|rank| address.of(rank, &config).unwrap());
        assert_eq!(ports.map(|address| address.port()), [9400, 9402, 9403]);
        let any: MetricsAddress = "0.0.0.0".parse().unwrap();
        assert_eq!(any.of(Some(Rank::worker(1)), &config).unwrap().port(), 0);
        let last: MetricsAddress = "127.0.0.1:65534".parse().unwrap();
        assert!(last.of(Some(Rank::server(1)), &config).unwrap_err().to_string().contains("1 ports follow"));
        assert!("localhost".parse::<MetricsAddress>().is_err());
    }
}
