//! What this process may do: lock memory, use huge pages, and what its container took away.
//!
//! Invariant: limits are those of the process that looks; start the doctor as the job is started.

use super::{Item, Tree, rdma};

/// Landing memory a server registers by default; with less the default job does not start over RDMA.
const LOCKED_BYTES: u64 = 1 << 30;

/// Numbers of the capabilities that matter here (linux/capability.h).
const CAPABILITIES: [(&str, u32); 4] =
    [("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13), ("CAP_IPC_LOCK", 14), ("CAP_SYS_NICE", 23)];

pub(super) fn look(tree: &Tree) -> Vec<Item> {
    vec![memlock(tree), capabilities(tree), huge_pages(tree), namespaces(tree)]
}

fn held(tree: &Tree) -> Vec<&'static str> {
    let mask = tree.field("/proc/self/status", "CapEff:").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
    let mask = mask.unwrap_or(0);
    CAPABILITIES.iter().filter(|(_, bit)| (mask >> bit) & 1 == 1).map(|(name, _)| *name).collect()
}

/// The soft and the hard limit, `None` for unlimited.
fn memlock_limits(tree: &Tree) -> Option<[Option<u64>; 2]> {
    let line = tree.field("/proc/self/limits", "Max locked memory")?;
    let mut words = line.split_whitespace();
    let mut limit = || match words.next()? {
        "unlimited" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    };
    Some([limit()?, limit()?])
}

fn memlock(tree: &Tree) -> Item {
    let Some([soft, hard]) = memlock_limits(tree) else {
        return Item::not_here("memlock", "/proc/self/limits cannot be read");
    };
    let (Some(soft), false) = (soft, held(tree).contains(&"CAP_IPC_LOCK")) else {
        return Item::fine("memlock", if soft.is_none() { "unlimited" } else { "CAP_IPC_LOCK: no limit holds" });
    };
    let found = format!("{soft} bytes");
    if soft >= LOCKED_BYTES {
        return Item::fine("memlock", found);
    }
    if rdma::devices(tree).is_empty() {
        return Item::fine("memlock", format!("{found}, enough without an RDMA device: locking is then best effort"));
    }
    let found = format!("{found}; an RDMA device registers {LOCKED_BYTES} bytes and more of locked memory");
    match hard.is_none_or(|hard| hard >= LOCKED_BYTES) {
        true => Item::wrong(
            "memlock",
            found,
            "ulimit -l unlimited (or `ulimit -l $(ulimit -Hl)`) in the shell that starts the job",
        ),
        false => Item::wrong(
            "memlock",
            found,
            "root: `* - memlock unlimited` in /etc/security/limits.d/gradwire.conf (then log in again), LimitMEMLOCK=infinity \
             in the systemd unit, or docker run --ulimit memlock=-1 --cap-add=IPC_LOCK",
        ),
    }
}

fn container(tree: &Tree) -> Option<&'static str> {
    let cgroup = tree.text("/proc/1/cgroup").unwrap_or_default();
    if tree.exists("/.dockerenv") || cgroup.contains("docker") {
        return Some("Docker");
    }
    if tree.exists("/run/.containerenv") {
        return Some("Podman");
    }
    if cgroup.contains("kubepods") {
        return Some("Kubernetes");
    }
    None
}

fn capabilities(tree: &Tree) -> Item {
    let (held, inside) = (held(tree), container(tree));
    let place = inside.map(|kind| format!(" (in a container: {kind})")).unwrap_or_default();
    let missing: Vec<&str> = CAPABILITIES.iter().map(|(name, _)| *name).filter(|name| !held.contains(name)).collect();
    match held.is_empty() {
        true => Item::not_here("capabilities", format!("none of {}{place}", missing.join(", "))),
        false => Item::fine("capabilities", format!("{}{place}", held.join(", "))),
    }
}

fn huge_pages(tree: &Tree) -> Item {
    let pools = "/sys/kernel/mm/hugepages";
    let free: Vec<String> = tree
        .names(pools)
        .into_iter()
        .filter_map(|pool| {
            let free = tree.number(&format!("{pools}/{pool}/free_hugepages")).filter(|free| *free > 0)?;
            Some(format!("{free} of {}", pool.strip_prefix("hugepages-").unwrap_or(&pool)))
        })
        .collect();
    if !free.is_empty() {
        return Item::fine("huge pages", format!("free: {}", free.join(", ")));
    }
    // Regions are memfds, which are shared memory to the kernel.
    let shared = tree.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = shared.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("", |(chosen, _)| chosen);
    match chosen {
        "always" | "advise" | "within_size" | "force" => {
            Item::fine("huge pages", format!("none set aside; transparent ones for shared memory: {chosen}"))
        }
        _ => Item::not_here("huge pages", "none set aside, and no transparent ones for shared memory").mend(
            "sysctl vm.nr_hugepages=512 (1 GiB), or echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

/// Ranks of one host share memory only if they share these.
fn namespaces(tree: &Tree) -> Item {
    let kinds = ["net", "pid", "ipc"];
    let differ: Vec<&str> = kinds
        .into_iter()
        .filter(|kind| {
            let of = |process: &str| tree.link(&format!("/proc/{process}/ns/{kind}"));
            matches!((of("self"), of("1")), (Some(own), Some(first)) if own != first)
        })
        .collect();
    match differ.is_empty() {
        true => Item::fine("namespaces", "those of process 1, as far as one may look"),
        false => Item::fine("namespaces", format!("own ones: {}", differ.join(", ")))
            .mend("ranks of one host that shall share memory must be in the same net and pid namespaces"),
    }
}
