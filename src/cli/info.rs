//! `gradwire info`: what this machine offers, and why not more.
//!
//! Invariant: every line is what was found on this machine now; what is absent is named with its reason.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::{
    Result,
    mem::{Topology, topology::DeviceKind},
};

#[derive(Args)]
pub(super) struct InfoArguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints what there is.
pub(super) fn run(arguments: &InfoArguments) -> Result<ExitCode> {
    let machine = gather();
    if arguments.json {
        println!("{machine}");
    } else {
        let Value::Object(sections) = &machine else { unreachable!("made as an object below") };
        sections.iter().for_each(|(title, value)| println!("{title:<12} {}", plain(value)));
    }
    Ok(ExitCode::SUCCESS)
}

fn gather() -> Value {
    let topology = Topology::discover();
    let nodes: Vec<Value> = topology
        .nodes
        .iter()
        .map(|node| {
            let cores: Vec<usize> = topology
                .cores
                .iter()
                .filter(|core| core.node == Some(node.os_index))
                .map(|core| core.os_index)
                .collect();
            json!({ "node": node.os_index, "memory_bytes": node.memory_bytes, "cores": cores })
        })
        .collect();
    let not_built = |name: &str| {
        let why = format!("not built yet: gradwire {} has no {name} driver", env!("CARGO_PKG_VERSION"));
        json!({ "available": false, "why": why })
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "target": env!("GRADWIRE_TARGET"),
        "topology": topology.source.to_string(),
        "cores": topology.cores.iter().map(|core| core.os_index).collect::<Vec<_>>(),
        "numa": nodes,
        "huge_pages": huge_pages(),
        "memlock": memlock(),
        "fabrics": {
            "tcp": { "available": true },
            "io_uring": not_built("io_uring"),
            "shm": not_built("shared-memory"),
            "verbs": not_built("verbs"),
        },
        "isa": { "chosen": crate::optim::isa().to_string(), "found": isas() },
        "gpus": gpus(&topology),
        "nics": topology.devices.iter().filter(|d| d.kind != DeviceKind::Gpu).map(|d| d.name.clone()).collect::<Vec<_>>(),
    })
}

/// Pages of each size that the kernel has set aside, and whether it gives transparent ones.
fn huge_pages() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_string());
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let pools: serde_json::Map<String, Value> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let count = |file: &str| read(&format!("{}/{file}", entry.path().display()))?.parse::<u64>().ok();
            let size = name.strip_prefix("hugepages-")?.to_string();
            Some((size, json!({ "total": count("nr_hugepages")?, "free": count("free_hugepages")? })))
        })
        .collect();
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| {
        let chosen = text.split_once('[')?.1.split_once(']')?.0;
        Some(chosen.to_string())
    });
    json!({ "pools": pools, "transparent": transparent.unwrap_or_else(|| "not offered by this kernel".into()) })
}

/// How many bytes this process may lock.
fn memlock() -> Value {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, hard)) => json!({ "soft_bytes": limit(soft), "hard_bytes": limit(hard) }),
        Err(e) => json!(format!("getrlimit failed: {e}")),
    }
}

fn limit(bytes: u64) -> Value {
    if bytes == nix::sys::resource::RLIM_INFINITY { json!("unlimited") } else { json!(bytes) }
}

/// Vector instructions that the processor says it has, of those that matter here.
fn isas() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap_or_default();
    let found: Vec<&str> = line.split_whitespace().collect();
    let wanted = ["sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve", "bf16"];
    wanted.iter().filter(|isa| found.contains(isa)).map(|isa| isa.to_string()).collect()
}

/// GPUs by the driver's own list, else those that hwloc sees.
fn gpus(topology: &Topology) -> Value {
    let driver = std::fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let mut names: Vec<String> = driver
        .filter_map(|entry| {
            let text = std::fs::read_to_string(entry.path().join("information")).ok()?;
            let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_string();
            Some(format!("{model} at {}", entry.file_name().to_string_lossy()))
        })
        .collect();
    if names.is_empty() {
        names = topology.devices.iter().filter(|d| d.kind == DeviceKind::Gpu).map(|d| d.name.clone()).collect();
    }
    match names.is_empty() {
        true => json!("none: no NVIDIA driver is loaded (/proc/driver/nvidia) and no display device is on the PCI bus"),
        false => json!(names),
    }
}

/// A value as people read it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "none".into(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(map) if map.is_empty() => "none".into(),
        Value::Object(map) => {
            let pair = |(key, value): (&String, &Value)| match value {
                Value::Bool(true) => "yes".to_string(),
                value if key == "available" && value == &json!(false) => "no".into(),
                Value::Object(_) => format!("\n  {key:<14} {}", plain(value)),
                value => format!("{key} {}", plain(value)),
            };
            map.iter().map(pair).collect::<Vec<_>>().join("; ").replace("; \n", "\n").replace("no; why ", "no, ")
        }
        other => other.to_string(),
    }
}
