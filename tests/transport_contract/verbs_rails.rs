//! Verbs over several rails: the contract, which rails a path uses, and how one that fails ends it.
//!
//! Where there are not two RDMA devices every test says so and passes; in scripts/rdma-vm, which has them, it fails instead.
//!
//! Invariant: whoever takes a port down is alone on its device meanwhile.

use std::{
    process::Command,
    sync::{PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Lease, Region, RegionOptions},
    transport::{
        Completion, Endpoint, RemoteSlot, Transport,
        verbs::{PortName, RAILS_MAX, VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{Note, NoteKind},
};

use crate::{
    verbs::{Verbs, is_there, options},
    world::{World, fill, is_filled, note, write},
};

/// Held by who uses the last device, and alone by who takes its port down.
static LAST_DEVICE: RwLock<()> = RwLock::new(());

fn last_device() -> RwLockReadGuard<'static, ()> {
    LAST_DEVICE.read().unwrap_or_else(PoisonError::into_inner)
}

/// Device names, sorted.
fn devices() -> Vec<String> {
    let folder = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    let mut devices: Vec<String> = folder.filter_map(|device| device.file_name().into_string().ok()).collect();
    devices.sort();
    devices
}

/// Every device as a rail, up to four.
fn rails() -> Vec<PortName> {
    devices().iter().take(RAILS_MAX).map(|name| name.parse().unwrap()).collect()
}

/// Whether this machine has two rails; says so if not.
fn are_there() -> bool {
    let is_vm = std::env::var("RDMA_VM").is_ok_and(|network| network == "dummy");
    let are_there = is_there() && rails().len() > 1;
    assert!(are_there || !is_vm, "this machine was made with two devices");
    if !are_there {
        eprintln!("SKIPPED, rails are NOT tested here: they take two devices");
    }
    are_there
}

mod two_rails {
    // Short rings and queues, so that one rail runs ahead of the other whenever it has more room.
    const SPOIL: fn(&mut super::VerbsOptions) = |options| {
        (options.ring_entries, options.send_depth, options.queue_limit) = (8, 32, 256);
        options.hca = super::rails();
    };
    contract!(
        super::Verbs::guarded(SPOIL, super::last_device()),
        if !super::are_there() {
            return;
        }
    );
}

#[test]
fn messages_go_over_both_rails_and_arrive_in_order() {
    if !are_there() {
        return;
    }
    let mut world = World::joined(Verbs::guarded(|options| options.hca = rails(), last_device()), 2, 4 << 20);
    let (a, b) = (world.peer(0), world.peer(1));
    for id in 0..60 {
        // A long one, and notes that would overtake it on another rail.
        let request = if id % 6 == 0 {
            let lease = world.sides[1].cut(256 << 10);
            let slot = world.sides[1].arm(a, lease);
            let mut source = world.sides[0].cut(256 << 10);
            fill(&mut source, id);
            write(id, b, source.freeze(), slot)
        } else {
            note(id, b, Note { clock: id, ..Note::new(NoteKind::Absent) })
        };
        world.sides[0].post(request);
    }
    world.until("all of them", |w| w.sides[1].arrived() == 60 && w.sides[0].sent() == 60);
    for (at, (heard, lease)) in world.sides[1].arrivals(a).into_iter().enumerate() {
        assert_eq!(heard.clock, at as u64);
        assert!(lease.is_none_or(|lease| is_filled(lease.bytes(), at as u64)));
    }
    assert!(world.sides[0].outcomes().iter().map(|(id, ..)| *id).eq(0..60));
    let carried: Vec<_> = world.sides[0].transport().carried().cloned().collect();
    assert_eq!(carried.iter().map(|rail| rail.notes).sum::<u64>(), 60, "{carried:?}");
    assert_eq!(carried.iter().map(|rail| rail.bytes).sum::<u64>(), 10 * (256 << 10), "{carried:?}");
    // Ten equal payloads on rails that are balanced by bytes: none has fewer than its share, less what one may be ahead.
    let least = 10 / carried.len() as u64 - 2;
    assert!(carried.iter().all(|rail| rail.bytes >= least * (256 << 10)), "{carried:?}");
}

#[test]
fn ends_with_different_rails_use_those_that_both_have() {
    if !are_there() {
        return;
    }
    let _last_device = last_device();
    let (me, them) = (PeerId::server(0, 0), PeerId::worker(0));
    let own = VerbsTransport::new(VerbsOptions { hca: rails(), ..options(me) }).unwrap();
    let other = VerbsTransport::new(VerbsOptions { hca: rails()[..1].to_vec(), ..options(them) }).unwrap();
    let (mut own, mut other) = (Loner::new(own, me), Loner::new(other, them));
    Loner::join(&mut own, &mut other);
    let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
    own.transport.register(&region).unwrap();
    let mut source = lease;
    for turn in 0..20 {
        let slot = other.arm(me);
        fill(&mut source, turn);
        own.transport.post(write(turn, them, source.freeze(), slot)).unwrap();
        Loner::until(&mut [&mut own, &mut other], "an arrival", |ends| {
            ends[1].heard.iter().any(|c| matches!(c, Completion::Arrived { .. }))
                && ends[0].heard.iter().any(|c| matches!(c, Completion::Sent { .. }))
        });
        let Some(Completion::Arrived { lease: Some(lease), .. }) = other.heard.pop() else {
            panic!("{:?}", other.heard)
        };
        assert!(is_filled(lease.bytes(), turn));
        other.lease = Some(lease);
        let Some(Completion::Sent { source: Some(back), .. }) = own.heard.pop() else { panic!("{:?}", own.heard) };
        source = back.thaw().unwrap();
    }
    let notes: Vec<u64> = own.transport.carried().map(|rail| rail.notes).collect();
    assert_eq!((notes[0], notes[1..].iter().sum::<u64>()), (20, 0));
}

/// One end that a test drives by itself.
struct Loner {
    transport: VerbsTransport,
    me: PeerId,
    lease: Option<Lease>,
    heard: Vec<Completion>,
}

impl Loner {
    fn new(mut transport: VerbsTransport, me: PeerId) -> Loner {
        let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        transport.register(&region).unwrap();
        Loner { transport, me, lease: Some(lease), heard: Vec::new() }
    }

    fn arm(&mut self, peer: PeerId) -> RemoteSlot {
        self.transport.arm(peer, self.lease.take().unwrap()).unwrap()
    }

    fn join(a: &mut Loner, b: &mut Loner) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let (offer, answer) = (a.transport.offer(b.me).unwrap(), b.transport.offer(a.me).unwrap());
        a.transport.connect(b.me, &answer, deadline).unwrap();
        b.transport.connect(a.me, &offer, deadline).unwrap();
        Loner::until(&mut [a, b], "Connected", |ends| {
            ends.iter().all(|end| end.heard.iter().any(|c| matches!(c, Completion::Connected { .. })))
        });
        a.heard.clear();
        b.heard.clear();
    }

    fn until(ends: &mut [&mut Loner], what: &str, reached: impl Fn(&[&mut Loner]) -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !reached(ends) {
            let heard: Vec<_> = ends.iter().map(|end| &end.heard).collect();
            assert!(Instant::now() < limit, "waited in vain for {what}: {heard:?}");
            for end in &mut *ends {
                end.transport.flush().unwrap();
                end.transport.poll(Instant::now(), &mut end.heard).unwrap();
            }
            std::thread::yield_now();
        }
    }

    /// Why its path broke.
    fn told(&self) -> Option<String> {
        self.heard.iter().find_map(|completion| match completion {
            Completion::Broken { error, .. } => Some(error.to_string()),
            _ => None,
        })
    }
}

/// The network interface of the last device, if there are several and it is a dummy, which nobody else needs.
fn dummy_of_the_last_device() -> Option<(String, String)> {
    let device = devices().pop().filter(|_| devices().len() > 1)?;
    let file = format!("/sys/class/infiniband/{device}/ports/1/gid_attrs/ndevs/0");
    let interface = std::fs::read_to_string(file).ok()?.trim().to_string();
    if !interface.starts_with("dummy") {
        eprintln!("SKIPPED: the last RDMA device is not on a dummy interface, which may be taken down");
        return None;
    }
    Some((device, interface))
}

/// Runs `test` with the rails of two joined ends, then takes the last device's port down and up again; gives the ends.
fn with_the_last_port_down(hca: &[PortName], interface: &str) -> [Loner; 2] {
    let set = |state| Command::new("ip").args(["link", "set", interface, state]).status().unwrap();
    let peers = [PeerId::server(0, 0), PeerId::worker(0)];
    let mut ends = peers.map(|peer| {
        Loner::new(VerbsTransport::new(VerbsOptions { hca: hca.to_vec(), ..options(peer) }).unwrap(), peer)
    });
    let [server, worker] = &mut ends;
    Loner::join(server, worker);
    assert!(set("down").success());
    Loner::until(&mut [server, worker], "Broken", |ends| ends.iter().all(|end| end.told().is_some()));
    assert!(set("up").success());
    ends
}

#[test]
fn a_port_that_goes_down_breaks_the_paths_that_have_a_rail_on_it_and_names_it() {
    if !are_there() {
        return;
    }
    let Some((device, interface)) = dummy_of_the_last_device() else { return };
    let _alone = LAST_DEVICE.write().unwrap_or_else(PoisonError::into_inner);
    let (all, last) = (rails(), [device.parse().unwrap()]);
    for hca in [&all[..], &last] {
        let ends = with_the_last_port_down(hca, &interface);
        for (end, other) in ends.iter().zip(["worker 0", "server 0"]) {
            let told = end.told().unwrap();
            assert!(told.contains(&format!("rail {device}:1: its port went down")) && told.contains(other), "{told}");
        }
    }
}

/// While a port is down, a path that is built anew goes over the rails that are left, and over all of them when it is up again.
#[test]
fn a_path_is_built_again_on_the_rails_that_are_up() {
    if !are_there() {
        return;
    }
    let Some((_, interface)) = dummy_of_the_last_device() else { return };
    let _alone = LAST_DEVICE.write().unwrap_or_else(PoisonError::into_inner);
    let mut ends = with_the_last_port_down(&rails(), &interface);
    let set = |state| assert!(Command::new("ip").args(["link", "set", &interface, state]).status().unwrap().success());
    let peers = ends.each_ref().map(|end| end.me);
    let last = rails().len() - 1;
    for (state, is_used) in [("down", false), ("up", true)] {
        set(state);
        std::thread::sleep(Duration::from_millis(500));
        for (end, peer) in ends.iter_mut().zip(peers.into_iter().rev()) {
            end.transport.fence(peer);
            end.heard.clear();
        }
        let [server, worker] = &mut ends;
        let before: Vec<u64> = server.transport.carried().map(|rail| rail.notes).collect();
        Loner::join(server, worker);
        for id in 0..40 {
            server.transport.post(note(id, peers[1], Note { clock: id, ..Note::new(NoteKind::Absent) })).unwrap();
        }
        Loner::until(&mut [server, worker], "all notes", |ends| {
            ends[1].heard.iter().filter(|c| matches!(c, Completion::Arrived { .. })).count() == 40
        });
        let carried: Vec<u64> =
            server.transport.carried().zip(&before).map(|(rail, before)| rail.notes - before).collect();
        assert_eq!((carried.iter().sum::<u64>(), carried[last] > 0), (40, is_used), "{state}: {carried:?}");
    }
}

#[test]
fn a_rail_in_error_breaks_the_path_and_names_it() {
    if !are_there() {
        return;
    }
    let _last_device = last_device();
    let peers = [PeerId::server(0, 0), PeerId::worker(0)];
    let [mut server, mut worker] = peers
        .map(|peer| Loner::new(VerbsTransport::new(VerbsOptions { hca: rails(), ..options(peer) }).unwrap(), peer));
    // An offer whose second rail is a pair that does not exist.
    let deadline = Instant::now() + Duration::from_secs(4);
    let (offer, answer) = (server.transport.offer(peers[1]).unwrap(), worker.transport.offer(peers[0]).unwrap());
    let mut parts: Vec<String> = offer.on("verbs").unwrap().split('/').map(String::from).collect();
    let mut fields: Vec<&str> = parts[1].split(',').collect();
    fields[3] = "16777213";
    parts[1] = fields.join(",");
    server.transport.connect(peers[1], &answer, deadline).unwrap();
    worker.transport.connect(peers[0], &Endpoint::new("verbs", parts.join("/")), deadline).unwrap();
    Loner::until(&mut [&mut server, &mut worker], "Broken", |ends| ends.iter().all(|end| end.told().is_some()));
    let second = devices()[1].clone();
    for end in [&server, &worker] {
        let told = end.told().unwrap();
        assert!(told.contains(&format!("rail {second}:1: ")) && told.contains("deadline"), "{told}");
        assert!(!end.heard.iter().any(|c| matches!(c, Completion::Connected { .. })), "{:?}", end.heard);
    }
}
