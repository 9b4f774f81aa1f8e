//! What a job shows of itself while it runs: metrics of every process, and a timeline of chosen steps.
//!
//! Invariant: what is counted is compared with what the layout says must have moved; nothing is asserted of how long anything took.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use gradwire::{
    launch::Job,
    layout::{Layout, LayoutOptions},
    session::Fabric,
};
use serde_json::Value;

use crate::{
    jobs::{end, home, options, run, wait_for_text, with_variable},
    program::{STEPS, model},
};

/// What `gradwire COMMAND test …` prints.
pub fn told(home: &std::path::Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    let output = command.args(arguments).env("GRADWIRE_HOME", home).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What an endpoint answers.
pub fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK") && text.contains("application/openmetrics-text"), "{text}");
    text
}

/// The value of the one sample whose line holds all of `parts`.
fn value(text: &str, parts: &[&str]) -> f64 {
    let lines: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part))).collect();
    assert_eq!(lines.len(), 1, "{parts:?} in\n{text}");
    lines[0].rsplit(' ').next().unwrap().parse().unwrap()
}

fn layout(shards: u16) -> Layout {
    Layout::build(&vec![model(); 2], LayoutOptions { chunk_elements: 256, shards }).unwrap()
}

#[test]
fn every_process_answers_with_metrics_that_add_up() {
    let home = home();
    let mut options = options(home.path(), "linger");
    options.config.metrics = Some("127.0.0.1:0".parse().unwrap());
    options.config.transports = vec![Fabric::Tcp];
    options.config.optimizer.clip.global_norm = Some(3.0);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "lingering");
    std::thread::sleep(Duration::from_millis(600)); // the other worker may be a step behind, gauges a moment
    let status: Value = serde_json::from_str(&told(home.path(), &["status", "test", "--json"])).unwrap();
    let ranks = status["ranks"].as_array().unwrap();
    let address = |name: &str| {
        let (role, index) = name.split_once(' ').unwrap();
        let index: u64 = index.parse().unwrap();
        let is = |rank: &&Value| rank["rank"]["role"] == role && rank["rank"]["index"] == index;
        ranks.iter().find(is).unwrap()["metrics"].as_str().unwrap().to_string()
    };
    let shown = told(home.path(), &["status", "test"]);
    assert!(shown.contains(&format!("metrics of server 1: http://{}/metrics", address("server 1"))), "{shown}");
    let layout = layout(2);
    for server in 0..2 {
        let own = scrape(&address(&format!("server {server}")));
        let chunks = layout.shards[server].len() as f64;
        let lens = || layout.shards[server].iter().map(|id| layout.chunk(*id).len);
        let bytes: u32 = lens().map(|len| len * 4).sum();
        // Places for parameters that are sent from where they lie are all alike.
        let places = 4.0 * f64::from(lens().max().unwrap()) * chunks;
        for worker in 0..2 {
            let other = scrape(&address(&format!("worker {worker}")));
            let (mine, theirs) = (format!("peer=\"worker {worker}\""), format!("peer=\"server {server}\""));
            for (direction, back, more) in [("received", "sent", 0.0), ("sent", "received", 1.0)] {
                let (there, here) = (format!("direction=\"{direction}\""), format!("direction=\"{back}\""));
                // Parameters are pulled once before the first step.
                let steps = STEPS as f64 + more;
                for (name, unit) in [("gradwire_chunks_total", chunks), ("gradwire_payload_bytes_total", bytes.into())]
                {
                    assert_eq!(value(&own, &[name, &mine, &there, "fabric=\"tcp\""]), steps * unit, "{own}");
                    assert_eq!(value(&other, &[name, &theirs, &here, "fabric=\"tcp\""]), steps * unit, "{other}");
                }
            }
            assert!(value(&own, &["gradwire_wait_seconds_sum", &mine, "cause=\"push\""]) > 0.0, "{own}");
            assert_eq!(value(&own, &["gradwire_path_fallback", &mine]), 0.0);
            assert!(value(&other, &["gradwire_wait_seconds_count", &theirs, "cause=\"parameters\""]) > 0.0, "{other}");
            assert_eq!(value(&other, &["gradwire_program_wait_seconds_count"]), STEPS as f64);
            assert_eq!(value(&other, &["gradwire_clock"]), STEPS as f64);
        }
        for task in ["task=\"reduce\"", "task=\"apply\""] {
            assert_eq!(value(&own, &["gradwire_computations_total", task]), STEPS as f64 * chunks);
            assert!(value(&own, &["gradwire_compute_seconds_total", task]) > 0.0);
        }
        assert_eq!(value(&own, &["gradwire_clock"]), STEPS as f64);
        assert_eq!(value(&own, &["gradwire_queue_depth", "queue=\"landed\""]), 0.0);
        assert_eq!(value(&own, &["gradwire_memory_bytes", "kind=\"master\""]), places);
    }
    let (scraped_worker, scraped_server) = (scrape(&address("worker 0")), scrape(&address("server 0")));
    let launcher = scrape(status["metrics"].as_str().unwrap());
    assert_eq!(value(&launcher, &["gradwire_ranks", "state=\"running\""]), 4.0, "{launcher}");
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
    let texts = [launcher, scraped_worker, scraped_server];
    documented(&texts);
    dashboard(&texts);
}

/// Every metric that is told stands in the documentation, and the other way round.
fn documented(texts: &[String]) {
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/observability.md")).unwrap();
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `gradwire_")?.split('`').next());
    let written: BTreeSet<String> = rows.map(|name| format!("gradwire_{name}")).collect();
    let types = texts.iter().flat_map(|text| text.lines()).filter_map(|line| line.strip_prefix("# TYPE "));
    let told: BTreeSet<String> = types
        .map(|line| match line.split_once(' ').unwrap() {
            (name, "counter") => format!("{name}_total"),
            (name, _) => name.to_string(),
        })
        .collect();
    assert_eq!(told, written, "told by the processes, and written in docs/observability.md");
}

/// A span as the trace has it: name, process, chunk, clock, worker, from and to in microseconds.
#[derive(Clone, Debug, PartialEq)]
struct Span {
    name: String,
    process: String,
    chunk: Option<u64>,
    clock: u64,
    worker: Option<u64>,
    from: f64,
    to: f64,
}

/// Reads a trace as a viewer does: complete events as they are, beginnings and ends by their id.
fn spans(trace: &Value) -> Vec<Span> {
    let events = trace["traceEvents"].as_array().unwrap();
    let named = |event: &&Value| event["ph"] == "M" && event["name"] == "process_name";
    let names: BTreeMap<u64, &str> = events
        .iter()
        .filter(named)
        .map(|event| (event["pid"].as_u64().unwrap(), event["args"]["name"].as_str().unwrap()))
        .collect();
    let mut ends: BTreeMap<u64, f64> = BTreeMap::new();
    for event in events.iter().filter(|event| event["ph"] == "e") {
        assert!(ends.insert(event["id"].as_u64().unwrap(), event["ts"].as_f64().unwrap()).is_none(), "{event}");
    }
    let begun = events.iter().filter(|event| event["ph"] == "X" || event["ph"] == "b");
    let spans = begun.map(|event| {
        let from = event["ts"].as_f64().unwrap();
        let to = match event["dur"].as_f64() {
            Some(time) => from + time,
            None => ends.remove(&event["id"].as_u64().unwrap()).expect("a span that ends"),
        };
        let args = &event["args"];
        let (name, clock) = (event["name"].as_str().unwrap().into(), args["clock"].as_u64().unwrap());
        let process = names[&event["pid"].as_u64().unwrap()].into();
        Span { name, process, chunk: args["chunk"].as_u64(), clock, worker: args["worker"].as_u64(), from, to }
    });
    let spans = spans.collect();
    assert!(ends.is_empty(), "ends without a beginning: {ends:?}");
    spans
}

/// A trace tells microseconds as decimal fractions: half a nanosecond.
const ROUNDING: f64 = 0.0005;

/// Checks that every chunk of every chosen clock is all there, and that what can only follow something does, but for `slack`
/// microseconds.
fn check(trace: &Value, clocks: std::ops::Range<u64>, shards: u16, slack: f64) {
    let spans = spans(trace);
    let layout = layout(shards);
    assert_eq!(trace["otherData"]["ends_missing"], 0, "{}", trace["otherData"]);
    let one = |name: &str, chunk: u64, clock: u64, worker: Option<u64>| {
        let is = |span: &&Span| {
            span.name == name && span.chunk == Some(chunk) && span.clock == clock && span.worker == worker
        };
        let found: Vec<&Span> = spans.iter().filter(is).collect();
        assert_eq!(found.len(), 1, "{name} of chunk {chunk}, clock {clock}, worker {worker:?}: {found:?}");
        found[0].clone()
    };
    for (clock, chunk) in
        clocks.clone().flat_map(|clock| (0..layout.chunks.len() as u64).map(move |chunk| (clock, chunk)))
    {
        let (reduce, apply) = (one("reduce", chunk, clock, None), one("apply", chunk, clock, None));
        let server = format!("server {}", layout.chunks[chunk as usize].shard.0);
        assert_eq!((&reduce.process, &apply.process), (&server, &server));
        for worker in 0..2 {
            let path = ["backward", "push", "wire", "reply"].map(|name| one(name, chunk, clock, Some(worker)));
            let [backward, push, wire, reply] = &path;
            assert_eq!(
                [backward, push, reply].map(|span| span.process.clone()),
                [(); 3].map(|()| format!("worker {worker}"))
            );
            assert_eq!(wire.process, server);
            let order = [backward, push, wire, &reduce, &apply, reply];
            for pair in order.windows(2) {
                assert!(pair[0].to <= pair[1].from + slack + ROUNDING, "{:?} before {:?}", pair[1], pair[0]);
            }
            assert!(order.iter().all(|span| span.from <= span.to + slack + ROUNDING), "{order:?}");
        }
    }
    let waits = spans.iter().filter(|span| span.name == "wait").count() as u64;
    assert_eq!(waits, 2 * (clocks.end - clocks.start), "one of each worker and clock");
    assert!(spans.iter().all(|span| clocks.contains(&span.clock)), "only the clocks that were chosen");
}

#[test]
fn a_timeline_shows_every_chunk_of_the_chosen_steps_in_causal_order() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let home = home();
        let file = home.path().join("trace.json");
        let mut options = options(home.path(), "train");
        options.config.transports = vec![fabric];
        options.config.optimizer.clip.global_norm = Some(3.0);
        options.config.timeline = Some("20..24".parse().unwrap());
        options.timeline = Some(file.clone());
        run(options);
        let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        check(&trace, 20..24, 2, 0.0);
        let threads = trace["otherData"]["threads"].as_array().unwrap();
        assert!(threads.iter().all(|thread| thread["marks_lost"] == 0 && thread["clock_error_ns"] == 0), "{threads:?}");
    }
}

#[test]
fn top_shows_rates_clocks_and_who_is_behind() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Tcp];
    with_variable(&mut options, "WORKER_PAUSE_MS", 40);
    with_variable(&mut options, "WORKER_STEPS", 200);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let ceiling = home.path().join("ceiling.json");
    std::fs::write(&ceiling, "{\"transport\":\"tcp\",\"ceiling_bytes_per_s\":5e9}\n").unwrap();
    let with_ceiling = ["top", "test", "--once", "--ceiling", ceiling.to_str().unwrap()];
    let shown = told(home.path(), &with_ceiling);
    for part in
        ["job test ", "steps/s", "server 1     running", "worker 0     running", "tcp ", "5.00 GB/s", "overlong"]
    {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
    assert!(!shown.contains('\x1b'), "one look is text alone");
    let json: Value = serde_json::from_str(&told(home.path(), &["top", "test", "--once", "--json"])).unwrap();
    assert!(json["steps_per_s"].as_f64().unwrap() > 0.0, "{json}");
    let fabric = &json["fabrics"][0];
    assert!(fabric["fabric"] == "tcp" && fabric["sent_bytes_per_s"].as_f64().unwrap() > 0.0, "{json}");
    assert!(fabric["ceiling_bytes_per_s"].is_null(), "{json}");
    assert_eq!(json["ranks"].as_array().unwrap().len(), 4);
    let mut stranger = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    let stranger = stranger.args(["top", "nobody", "--once"]).env("GRADWIRE_HOME", home.path()).output().unwrap();
    assert_eq!(stranger.status.code(), Some(2), "no directory, no token, no answer");
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
}

/// The dashboard is what Grafana's provisioning takes, and asks for nothing that no process tells.
fn dashboard(texts: &[String]) {
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/grafana/gradwire.json")).unwrap();
    let board: Value = serde_json::from_slice(&file).unwrap();
    for field in ["title", "uid"] {
        assert!(board[field].as_str().is_some_and(|text| !text.is_empty() && text.len() <= 40), "{field}");
    }
    assert!(board["schemaVersion"].as_u64().is_some_and(|version| version >= 36), "older ones are migrated");
    let variables: BTreeSet<&str> = board["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    let (mut ids, mut places) = (BTreeSet::new(), Vec::new());
    let mut asked = BTreeSet::new();
    for panel in board["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "two panels have id {}", panel["id"]);
        assert!(!panel["title"].as_str().unwrap().is_empty());
        assert!(matches!(panel["type"].as_str().unwrap(), "timeseries" | "stat"), "{panel}");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{panel}");
        let overlaps =
            |(ox, oy, ow, oh): &(u64, u64, u64, u64)| x < ox + ow && *ox < x + w && y < oy + oh && *oy < y + h;
        assert!(!places.iter().any(overlaps), "{panel} lies on another");
        places.push((x, y, w, h));
        let mut letters = BTreeSet::new();
        for target in panel["targets"].as_array().unwrap() {
            assert!(letters.insert(target["refId"].as_str().unwrap()), "{target}");
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{target}");
            let query = target["expr"].as_str().unwrap();
            for (open, close) in [('(', ')'), ('{', '}'), ('[', ']')] {
                assert_eq!(query.matches(open).count(), query.matches(close).count(), "{query}");
            }
            let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '$'));
            for word in words {
                if let Some(variable) = word.strip_prefix('$') {
                    assert!(variable == "__rate_interval" || variables.contains(variable), "{query}");
                } else if word.starts_with("gradwire_") {
                    asked.insert(word.to_string());
                }
            }
        }
    }
    assert!(variables.contains("datasource") && asked.len() > 15, "{asked:?}");
    let samples: BTreeSet<&str> =
        texts.iter().flat_map(|text| text.lines()).filter_map(|line| line.split(['{', ' ']).next()).collect();
    // The one that is absent before there is a checkpoint.
    let missing = asked.iter().filter(|name| !samples.contains(name.as_str()) && *name != "gradwire_checkpoint_clock");
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&String>::new(), "asked for, and told by nobody");
}
