//! `gradwire info`: what this machine offers, and why not more.
//!
//! Invariant: every line is what was found on this machine now; what is absent is named with its reason.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    cuda::{self, DeviceInfo},
    mem::{HugePages, Region, RegionOptions, Topology, topology::DeviceKind},
    optim::Isa,
};

/// Asked for to find out whether regions get huge pages: one of the usual size.
const PROBE_BYTES: usize = 2 << 20;

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
        println!("{machine}")
    } else {
        print!("{}", table(&machine))
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
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "target": env!("GRADWIRE_TARGET"),
        "topology": topology.source.to_string(),
        "cores": topology.cores.iter().map(|core| core.os_index).collect::<Vec<_>>(),
        "numa": nodes,
        "huge_pages": huge_pages(),
        "memlock": memlock(),
        "fabrics": fabrics(),
        "isa": {
            "chosen": crate::optim::isa(),
            "kernels": Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>(),
            "processor": processor(),
        },
        "gpus": gpus(&topology),
        "nics": topology.devices.iter().filter(|d| d.kind != DeviceKind::Gpu).map(|d| d.name.clone()).collect::<Vec<_>>(),
    })
}

/// Every fabric, tried: what it would use, or why it cannot be had.
fn fabrics() -> Value {
    let tried = crate::session::fabrics::probe().into_iter().map(|(name, outcome)| {
        let about = match outcome {
            Ok(about) => json!({ "available": true, "about": about }),
            Err(error) => json!({ "available": false, "why": error.to_string() }),
        };
        (name.to_string(), about)
    });
    Value::Object(tried.collect())
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
    // What a region gets is found out by asking for one.
    let options = RegionOptions { name: "probe".into(), huge_pages: HugePages::Always, ..RegionOptions::default() };
    let regions = match Region::allocate(PROBE_BYTES, &options) {
        Ok(_) => json!({ "huge": true }),
        Err(Error::Config(why)) => {
            // The advice at its end is for who insists on huge pages.
            let why = why.strip_prefix("region `probe` must have huge pages, but ").unwrap_or(&why);
            json!({ "huge": false, "why": why.split("; or set").next() })
        }
        Err(error) => json!({ "huge": false, "why": error.to_string() }),
    };
    let transparent = transparent.unwrap_or_else(|| "not offered by this kernel".into());
    json!({ "pools": pools, "transparent": transparent, "regions": regions })
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
fn processor() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap_or_default();
    let found: Vec<&str> = line.split_whitespace().collect();
    let wanted = ["sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve", "bf16"];
    wanted.iter().filter(|isa| found.contains(isa)).map(|isa| isa.to_string()).collect()
}

/// The GPUs that servers can compute on, or why there are none; and those that the PCI bus shows all the same.
fn gpus(topology: &Topology) -> Value {
    match cuda::devices() {
        Ok(devices) => {
            let version = cuda::driver_version().unwrap_or_else(|error| error.to_string());
            let device = |info: &DeviceInfo| {
                json!({
                    "gpu": info.ordinal,
                    "name": info.name,
                    "memory_bytes": info.memory_bytes,
                    "capability": format!("{}.{}", info.capability.0, info.capability.1),
                    "pci": info.pci,
                    "numa": info.numa_node,
                })
            };
            json!({ "cuda": version, "devices": devices.iter().map(device).collect::<Vec<_>>() })
        }
        Err(error) => {
            let seen = topology.devices.iter().filter(|device| device.kind == DeviceKind::Gpu);
            json!({ "why": error.to_string(), "on_pci": seen.map(|device| device.name.clone()).collect::<Vec<_>>() })
        }
    }
}

/// The same for people: a name, then what there is of it.
fn table(machine: &Value) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        ("version", format!("{} ({})", text(&machine["version"]), text(&machine["target"]))),
        ("topology", text(&machine["topology"])),
        ("cores", text(&machine["cores"])),
    ];
    for node in elements(&machine["numa"]) {
        let memory = bytes(&node["memory_bytes"]);
        lines.push(("numa", format!("node {}: {memory}, cores {}", text(&node["node"]), text(&node["cores"]))));
    }
    let huge = &machine["huge_pages"];
    for (size, pool) in huge["pools"].as_object().into_iter().flatten() {
        lines.push(("huge pages", format!("{size}: {} free of {}", text(&pool["free"]), text(&pool["total"]))));
    }
    lines.push(("", format!("transparent: {}", text(&huge["transparent"]))));
    lines.push(("", format!("for regions: {}", yes_or_why(&huge["regions"], "huge"))));
    let memlock = &machine["memlock"];
    lines.push((
        "memlock",
        match memlock.is_object() {
            true => format!("{} soft, {} hard", bytes(&memlock["soft_bytes"]), bytes(&memlock["hard_bytes"])),
            false => text(memlock),
        },
    ));
    for (name, fabric) in machine["fabrics"].as_object().into_iter().flatten() {
        let about = fabric["about"].as_str().map(|about| format!(", {about}")).unwrap_or_default();
        lines.push(("fabrics", format!("{name}: {}{about}", yes_or_why(fabric, "available"))));
    }
    let isa = &machine["isa"];
    lines.push(("isa", format!("{} of {}", text(&isa["chosen"]), text(&isa["kernels"]))));
    lines.push(("", format!("the processor says: {}", text(&isa["processor"]))));
    lines.push(("nics", text(&machine["nics"])));
    let gpus = &machine["gpus"];
    for gpu in elements(&gpus["devices"]) {
        let (memory, node) = (bytes(&gpu["memory_bytes"]), &gpu["numa"]);
        let node = node.as_u64().map_or(String::new(), |node| format!(", NUMA node {node}"));
        let (index, name, capability) = (text(&gpu["gpu"]), text(&gpu["name"]), text(&gpu["capability"]));
        let driver = text(&gpus["cuda"]);
        let line =
            format!("{index}: {name}, {memory}, compute capability {capability}{node}, driver for CUDA {driver}");
        lines.push(("gpus", line));
    }
    if let Some(why) = gpus["why"].as_str() {
        let seen = elements(&gpus["on_pci"]);
        let seen = if seen.is_empty() { String::new() } else { format!("; the PCI bus has {}", text(&gpus["on_pci"])) };
        lines.push(("gpus", format!("none: {why}{seen}")));
    }
    let mut before = "";
    let mut table = String::new();
    for (name, what) in lines {
        let shown = if name == before { "" } else { name };
        table += &format!("{shown:<12}{what}\n");
        before = name;
    }
    table
}

fn elements(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn yes_or_why(value: &Value, key: &str) -> String {
    if value[key] == true { "yes".into() } else { format!("no, {}", text(&value["why"])) }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "none".into(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Bytes in the largest unit that leaves a number before the point.
fn bytes(value: &Value) -> String {
    let Some(bytes) = value.as_u64() else { return text(value) };
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}
