//! Machines that one does not have, as trees of files in a temporary folder.
//!
//! Invariant: every verdict is asked for by what /proc and /sys say, never by the machine that runs the tests.

use std::{io, os::unix::fs::symlink, path::Path};

use super::{Item, Tree, Verdict, gpu, limits, probe, rdma};
use crate::mem::{
    Topology,
    topology::{Core, Device, DeviceKind, Node, Source},
};

const MLX: &str = "sys/class/infiniband/mlx5_0";
const V2_IPV4: &str = "0000:0000:0000:0000:0000:ffff:0a00:0001";
const LINK_LOCAL: &str = "fe80:0000:0000:0000:0202:03ff:fe04:0506";
const EMPTY: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

struct Machine {
    root: tempfile::TempDir,
}

impl Machine {
    fn new() -> Machine {
        Machine { root: tempfile::tempdir().unwrap() }
    }

    fn set(&self, path: &str, text: &str) -> &Machine {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    fn tree(&self) -> Tree {
        Tree::at(self.root.path())
    }

    /// A NIC of two ports on node 1: the first up on eth0, the second down on eth1; limits as a distribution leaves them.
    fn with_mlx5() -> Machine {
        let machine = Machine::new();
        for (port, interface, state) in
            [("1", "eth0", ["4: ACTIVE", "5: LinkUp"]), ("2", "eth1", ["1: DOWN", "3: Disabled"])]
        {
            let set = |file: &str, text: &str| machine.set(&format!("{MLX}/ports/{port}/{file}"), text);
            set("state", state[0]);
            set("phys_state", state[1]);
            set("link_layer", "Ethernet");
            set("rate", "100 Gb/sec (4X EDR)");
            for (index, gid, kind) in [
                ("0", LINK_LOCAL, "IB/RoCE v1"),
                ("1", LINK_LOCAL, "RoCE v2"),
                ("3", V2_IPV4, "RoCE v2"),
                ("10", EMPTY, ""),
            ] {
                set(&format!("gids/{index}"), gid);
                set(&format!("gid_attrs/types/{index}"), kind);
                set(&format!("gid_attrs/ndevs/{index}"), interface);
            }
            machine.set(&format!("sys/class/net/{interface}/mtu"), "9000");
        }
        machine.set(&format!("{MLX}/device/numa_node"), "1");
        machine.set("sys/class/infiniband_verbs/uverbs0/ibdev", "mlx5_0").set("dev/infiniband/uverbs0", "");
        machine.set("usr/lib64/libibverbs.so.1", "");
        machine.memlock("8388608", "8388608").set("proc/self/status", "CapEff:\t0000000000000000\nSeccomp:\t0");
        machine
    }

    fn memlock(&self, soft: &str, hard: &str) -> &Machine {
        let line =
            format!("Limit             Soft Limit   Hard Limit   Units\nMax locked memory {soft}   {hard}   bytes");
        self.set("proc/self/limits", &line)
    }

    fn rdma(&self) -> Vec<Item> {
        rdma::look(&self.tree(), &two_nodes(&[0, 1]))
    }
}

/// A GPU on node 1 and a core on each of `nodes`.
fn two_nodes(nodes: &[u32]) -> Topology {
    let core = |(at, node): (usize, &u32)| Core { os_index: at, physical: at, node: Some(*node) };
    Topology {
        cores: nodes.iter().enumerate().map(core).collect(),
        nodes: [0, 1].map(|os_index| Node { os_index, memory_bytes: 1 << 30 }).to_vec(),
        devices: vec![Device { name: "cuda0".into(), kind: DeviceKind::Gpu, node: Some(1), pci: None }],
        source: Source::Description,
    }
}

fn find<'a>(items: &'a [Item], topic: &str, subject: &str) -> &'a Item {
    let found = items.iter().find(|item| item.topic == topic && item.subject == subject);
    found.unwrap_or_else(|| panic!("no {topic} of `{subject}` in {items:#?}"))
}

#[track_caller]
fn check(item: &Item, verdict: Verdict, found: &str, mend: &str) {
    assert_eq!(item.verdict, verdict, "{item:?}");
    assert!(item.found.contains(found), "`{found}` is not in {item:?}");
    assert!(item.mend.as_deref().unwrap_or("").contains(mend), "`{mend}` is not in {item:?}");
    assert!(verdict != Verdict::Wrong || item.mend.is_some(), "nothing mends {item:?}");
}

#[test]
fn a_machine_without_rdma_is_not_wrong() {
    let items = Machine::new().rdma();
    assert_eq!(items.len(), 1);
    check(&items[0], Verdict::NotHere, "tcp", "rdma link add");
}

#[test]
fn one_port_is_up_and_the_other_down() {
    let machine = Machine::with_mlx5();
    let items = machine.rdma();
    check(find(&items, "rdma devices", ""), Verdict::Fine, "mlx5_0", "");
    check(find(&items, "libibverbs", ""), Verdict::Fine, "/usr/lib64/", "");
    check(find(&items, "port", "mlx5_0/1"), Verdict::Fine, "ACTIVE (link LinkUp), Ethernet, 100 Gb/sec", "");
    check(find(&items, "port", "mlx5_0/2"), Verdict::Wrong, "DOWN (link Disabled)", "ip link set eth1 up");
    check(find(&items, "mtu", "mlx5_0/1"), Verdict::Fine, "4096", "");
    assert!(!items.iter().any(|item| item.topic == "gid" && item.subject == "mlx5_0/2"), "{items:?}");
    let wrong = items.iter().filter(|item| item.verdict == Verdict::Wrong).count();
    assert_eq!(wrong, 1, "{items:#?}");
}

#[test]
fn ports_that_are_alike_could_be_rails() {
    let machine = Machine::with_mlx5();
    assert!(!machine.rdma().iter().any(|item| item.topic == "rails"), "one port is up");
    machine.set(&format!("{MLX}/ports/2/state"), "4: ACTIVE");
    let told = "mlx5_0:1, mlx5_0:2 are alike; a job uses one of them, several with GRADWIRE_RAILS=2 or GRADWIRE_HCA=mlx5_0:1,mlx5_0:2";
    check(find(&machine.rdma(), "rails", ""), Verdict::Fine, told, "");
    machine.set(&format!("{MLX}/ports/2/link_layer"), "InfiniBand");
    assert!(!machine.rdma().iter().any(|item| item.topic == "rails"), "they are of two kinds");
}

#[test]
fn an_infiniband_port_without_subnet_manager() {
    let machine = Machine::with_mlx5();
    machine.set(&format!("{MLX}/ports/1/state"), "2: INIT").set(&format!("{MLX}/ports/1/link_layer"), "InfiniBand");
    check(find(&machine.rdma(), "port", "mlx5_0/1"), Verdict::Wrong, "INIT", "opensm");
}

#[test]
fn the_gid_is_the_best_one_of_the_table() {
    let machine = Machine::with_mlx5();
    let gid = |machine: &Machine| find(&machine.rdma(), "gid", "mlx5_0/1").clone();
    check(&gid(&machine), Verdict::Fine, "of 3 we would use index 3 (10.0.0.1, RoCE v2) on eth0", "");
    machine.set(&format!("{MLX}/ports/1/gids/3"), EMPTY);
    check(
        &gid(&machine),
        Verdict::Wrong,
        "index 1 (fe80::202:3ff:fe04:506, RoCE v2) on eth0: a link-local",
        "dev eth0",
    );
    machine
        .set(&format!("{MLX}/ports/1/gids/10"), "2001:0db8::1")
        .set(&format!("{MLX}/ports/1/gid_attrs/types/10"), "RoCE v2");
    check(&gid(&machine), Verdict::Fine, "index 10 (2001:db8::1", "");
    machine.set(&format!("{MLX}/ports/1/gids/10"), EMPTY).set(&format!("{MLX}/ports/1/gids/1"), EMPTY);
    check(&gid(&machine), Verdict::Wrong, "no RoCE v2", "ip address add");
    machine.set(&format!("{MLX}/ports/1/gids/0"), EMPTY);
    check(&gid(&machine), Verdict::Wrong, "empty", "ip address add");
}

#[test]
fn packets_follow_the_interface() {
    let machine = Machine::with_mlx5();
    for (mtu, verdict, found) in [
        ("4192", Verdict::Fine, "4096 bytes"),
        ("4191", Verdict::Wrong, "2048 bytes instead of 4096"),
        ("1500", Verdict::Wrong, "1024 bytes"),
        ("300", Verdict::Wrong, "too small"),
    ] {
        machine.set("sys/class/net/eth0/mtu", mtu);
        let mend = if verdict == Verdict::Wrong { "ip link set eth0 mtu" } else { "" };
        check(find(&machine.rdma(), "mtu", "mlx5_0/1"), verdict, found, mend);
    }
}

#[test]
fn flow_control_is_told_where_it_can_be_read() {
    let machine = Machine::with_mlx5();
    check(find(&machine.rdma(), "pfc/ecn", "mlx5_0/1"), Verdict::NotHere, "eth0", "dcb pfc show dev eth0");
    for part in ["np", "rp"] {
        machine.set(&format!("sys/class/net/eth0/ecn/roce_{part}/enable/3"), if part == "np" { "1" } else { "0" });
    }
    check(find(&machine.rdma(), "pfc/ecn", "mlx5_0/1"), Verdict::Wrong, "off", "roce_np/enable");
    machine.set("sys/class/net/eth0/ecn/roce_rp/enable/3", "1");
    check(find(&machine.rdma(), "pfc/ecn", "mlx5_0/1"), Verdict::Fine, "priorities 3", "");
}

#[test]
fn a_container_without_the_device_and_a_machine_without_the_library() {
    let machine = Machine::with_mlx5();
    std::fs::remove_file(machine.root.path().join("dev/infiniband/uverbs0")).unwrap();
    std::fs::remove_file(machine.root.path().join("usr/lib64/libibverbs.so.1")).unwrap();
    let items = machine.rdma();
    check(find(&items, "device file", "mlx5_0"), Verdict::Wrong, "uverbs0 is missing", "--device=/dev/infiniband");
    check(find(&items, "libibverbs", ""), Verdict::Wrong, "libibverbs.so.1", "ibverbs-providers");
}

#[test]
fn cores_far_from_the_nic_are_wrong() {
    let machine = Machine::with_mlx5();
    check(find(&machine.rdma(), "numa", "mlx5_0"), Verdict::Fine, "node 1, with cuda0", "");
    let items = rdma::look(&machine.tree(), &two_nodes(&[0]));
    check(find(&items, "numa", "mlx5_0"), Verdict::Wrong, "node 1", "numactl --cpunodebind=1");
    machine.set(&format!("{MLX}/device/numa_node"), "-1");
    check(find(&machine.rdma(), "numa", "mlx5_0"), Verdict::NotHere, "no NUMA node", "");
}

#[test]
fn memlock_matters_where_a_device_registers() {
    let machine = Machine::with_mlx5();
    let memlock = |machine: &Machine| find(&limits::look(&machine.tree()), "memlock", "").clone();
    check(&memlock(&machine), Verdict::Wrong, "8388608 bytes", "LimitMEMLOCK=infinity");
    machine.memlock("8388608", "unlimited");
    check(&memlock(&machine), Verdict::Wrong, "8388608 bytes", "ulimit -l unlimited");
    machine.memlock("1073741824", "1073741824");
    check(&memlock(&machine), Verdict::Fine, "1073741824", "");
    machine.memlock("65536", "65536").set("proc/self/status", "CapEff:\t0000000000004000");
    check(&memlock(&machine), Verdict::Fine, "CAP_IPC_LOCK", "");
    let bare = Machine::new();
    bare.memlock("65536", "65536");
    check(&memlock(&bare), Verdict::Fine, "best effort", "");
}

#[test]
fn capabilities_namespaces_and_huge_pages() {
    let machine = Machine::new();
    machine.set("proc/self/status", "CapEff:\t0000000000002000").set("proc/1/cgroup", "0::/kubepods/pod1");
    for (process, net) in [("self", "net:[2]"), ("1", "net:[1]")] {
        machine.set(&format!("proc/{process}/ns/here"), "");
        let link = machine.root.path().join(format!("proc/{process}/ns/net"));
        symlink(Path::new(net), link).unwrap();
    }
    let items = limits::look(&machine.tree());
    check(find(&items, "capabilities", ""), Verdict::Fine, "CAP_NET_RAW (in a container: Kubernetes)", "");
    check(find(&items, "namespaces", ""), Verdict::Fine, "own ones: net", "same net and pid");
    check(find(&items, "huge pages", ""), Verdict::NotHere, "none set aside", "vm.nr_hugepages");
    machine.set("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force");
    check(find(&limits::look(&machine.tree()), "huge pages", ""), Verdict::Fine, "advise", "");
    machine.set("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "12");
    check(find(&limits::look(&machine.tree()), "huge pages", ""), Verdict::Fine, "12 of 2048kB", "");
}

#[test]
fn who_refuses_io_uring() {
    let refused = |errno: i32| Err(io::Error::from_raw_os_error(errno));
    let machine = Machine::new();
    check(&probe::judge_io_uring(&machine.tree(), Ok(())), Verdict::Fine, "allowed", "");
    check(&probe::judge_io_uring(&machine.tree(), refused(libc::ENOSYS)), Verdict::NotHere, "built without it", "");
    machine.set("proc/self/status", "Seccomp:\t2").set("proc/sys/kernel/io_uring_disabled", "0");
    check(&probe::judge_io_uring(&machine.tree(), refused(libc::EPERM)), Verdict::NotHere, "seccomp", "--security-opt");
    machine.set("proc/sys/kernel/io_uring_disabled", "2");
    let item = probe::judge_io_uring(&machine.tree(), refused(libc::EPERM));
    check(&item, Verdict::NotHere, "io_uring_disabled=2", "sysctl kernel.io_uring_disabled=0");
    machine.set("proc/sys/kernel/io_uring_disabled", "1").set("proc/self/status", "Seccomp:\t0");
    check(
        &probe::judge_io_uring(&machine.tree(), refused(libc::EPERM)),
        Verdict::NotHere,
        "one group",
        "io_uring_group",
    );
}

#[test]
fn what_shared_memory_lacks_is_named() {
    let missing = || Err(io::Error::from_raw_os_error(libc::ENOSYS));
    let item = probe::judge_shared_memory([("memfd_create", Ok(())), ("pidfd_open", missing()), ("a socket", Ok(()))]);
    check(&item, Verdict::Wrong, "pidfd_open: ", "seccomp profile");
    assert!(!item.found.contains("memfd"), "{item:?}");
}

/// Where a driver answers (a machine with a GPU), there is nothing to be said against it.
#[test]
fn a_gpus_module_without_its_library_is_wrong() {
    let machine = Machine::with_mlx5();
    let is_there = crate::cuda::devices().is_ok();
    let item = gpu::ask(&machine.tree());
    assert_eq!(item.verdict, if is_there { Verdict::Fine } else { Verdict::NotHere }, "{item:?}");
    machine.set("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15");
    if !is_there {
        check(&gpu::ask(&machine.tree()), Verdict::Wrong, "libcuda.so.1", "--gpus all");
    }
}

#[test]
fn gpu_memory_needs_a_way_to_it() {
    let machine = Machine::with_mlx5();
    let look = |machine: &Machine| gpu::look(&machine.tree(), &two_nodes(&[0]));
    check(&look(&machine)[0], Verdict::NotHere, "no NVIDIA driver", "");
    machine.set("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15");
    check(&look(&machine)[0], Verdict::Fine, "cuda0 on node 1", "");
    check(&look(&machine)[1], Verdict::Wrong, "nvidia-peermem", "modprobe nvidia-peermem");
    machine.set("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15");
    check(&look(&machine)[1], Verdict::Fine, "dma-buf", "");
    machine.set("proc/driver/nvidia/version", "closed").set("sys/module/nvidia_peermem/refcnt", "0");
    check(&look(&machine)[1], Verdict::Fine, "nvidia-peermem is loaded", "");
}
