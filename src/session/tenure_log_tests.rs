//! The log of tenures on a disk that fails, or is gone, at every single call.
//!
//! Invariant: a disk of these tests forgets what was not synced, and keeps a part of it if it likes.

use super::*;
use crate::types::PeerId;

/// What a call does that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It fails, and half of what it was to do is done.
    Error,
    /// The machine is gone in the middle of it.
    Crash,
}

/// A file whose n-th call goes wrong, and the ones after it too if it is a crash.
#[derive(Debug)]
struct Disk {
    bytes: Vec<u8>,
    /// So many of them survive for certain.
    durable: usize,
    calls: usize,
    fault: Option<(usize, Fault)>,
    crashed: bool,
}

impl Disk {
    fn new(bytes: Vec<u8>, fault: Option<(usize, Fault)>) -> Disk {
        Disk { durable: bytes.len(), bytes, calls: 0, fault, crashed: false }
    }

    /// Whether this call goes wrong.
    fn fails(&mut self) -> bool {
        self.calls += 1;
        match self.fault {
            Some((call, fault)) if call == self.calls => {
                self.crashed = fault == Fault::Crash;
                true
            }
            _ => self.crashed,
        }
    }
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(28)
}

impl LogFile for Disk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.crashed {
            return Err(broken());
        }
        let fails = self.fails();
        self.bytes.extend(&bytes[..if fails { bytes.len() / 2 } else { bytes.len() }]);
        if fails { Err(broken()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.fails() {
            return Err(broken());
        }
        self.durable = self.bytes.len();
        Ok(())
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        if self.crashed || self.fails() {
            return Err(broken());
        }
        self.bytes.truncate(length as usize);
        self.durable = self.bytes.len();
        Ok(())
    }
}

const SHARDS: u16 = 2;

fn next(shard: u16, epoch: Epoch) -> Tenure {
    Tenure {
        epoch,
        primary: PeerId::server((shard + epoch as u16) % 2, 0),
        other: None,
        is_paired: epoch.is_multiple_of(2),
    }
}

/// Swaps each shard from epoch to epoch, as often as there is success; gives what was answered with success, in order.
fn swap_all(log: &mut Log<Disk>, tries: usize) -> Vec<(ShardId, Tenure)> {
    let mut done = Vec::new();
    for index in 0..tries {
        let shard = ShardId(index as u16 % SHARDS);
        let present = log.tenures.get(&shard).map_or(0, |tenure| tenure.epoch);
        let tenure = next(shard.0, present + 1);
        match log.swap(shard, present, tenure) {
            Swap::Swapped => done.push((shard, tenure)),
            Swap::Unavailable(why) => assert!(why.contains("could not be written"), "{why}"),
            Swap::Present(present) => panic!("nobody else swaps: {present:?}"),
        }
    }
    done
}

#[test]
fn whatever_call_fails_what_was_answered_is_there_and_in_order() {
    let (mut faults, mut after_error) = (0, 0);
    for fault in [Fault::Error, Fault::Crash] {
        for call in 1.. {
            let mut log = match Log::recover(Disk::new(Vec::new(), Some((call, fault))), &[]) {
                Ok(log) => log,
                Err(_) => continue, // the launcher does not start
            };
            let done = swap_all(&mut log, 6);
            if log.file.calls < call {
                break;
            }
            faults += 1;
            after_error += usize::from(fault == Fault::Error && done.len() == 5);
            // All that a crash may leave: what is durable, and any part of the rest.
            let Disk { bytes, durable, .. } = log.file;
            for length in durable..=bytes.len() {
                let left = bytes[..length].to_vec();
                let again = Log::recover(Disk::new(left.clone(), None), &left).unwrap();
                let mut wanted: BTreeMap<ShardId, Tenure> = done.iter().copied().collect();
                if again.tenures != wanted {
                    // What nobody was told of may have come through, wholly: the next of one shard.
                    let (shard, tenure) = again.tenures.iter().find(|(shard, t)| wanted.get(shard) != Some(t)).unwrap();
                    let before = wanted.insert(*shard, *tenure).map_or(0, |tenure| tenure.epoch);
                    assert_eq!(*tenure, next(shard.0, before + 1));
                    assert_eq!(again.tenures, wanted, "{fault:?} at call {call}, {length} bytes left");
                    assert_eq!(fault, Fault::Crash, "after an error the log was mended");
                }
                let mut again = again;
                assert_eq!(swap_all(&mut again, 4).len(), 4, "it goes on");
                let Disk { bytes, .. } = again.file;
                assert_eq!(Log::recover(Disk::new(bytes.clone(), None), &bytes).unwrap().tenures, again.tenures);
            }
        }
    }
    assert!(faults > 20 && after_error > 5, "{faults} faults, {after_error} of them survived");
}

#[test]
fn a_damaged_line_ends_the_log() {
    let mut log = Log::recover(Disk::new(Vec::new(), None), &[]).unwrap();
    swap_all(&mut log, 4);
    let whole = log.file.bytes;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x08;
        let lines_before = whole[..at].iter().filter(|byte| **byte == b'\n').count();
        let log = Log::recover(Disk::new(bytes.clone(), None), &bytes).unwrap();
        assert_eq!(log.file.bytes.iter().filter(|byte| **byte == b'\n').count(), lines_before, "a bit flipped at {at}");
    }
}

#[test]
fn of_two_swaps_of_one_epoch_one_succeeds_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tenures");
    let mut log = TenureLog::open(&path).unwrap();
    let (first, other) = (next(0, 1), Tenure { is_paired: true, ..next(0, 1) });
    assert_eq!(log.compare_and_swap(ShardId(0), 0, first), Swap::Swapped);
    assert_eq!(log.compare_and_swap(ShardId(0), 0, other), Swap::Present(first));
    drop(log);
    let mut log = TenureLog::open(&path).unwrap();
    assert_eq!(log.compare_and_swap(ShardId(0), 0, other), Swap::Present(first));
    assert_eq!(log.compare_and_swap(ShardId(0), 1, next(0, 2)), Swap::Swapped);
    assert!(matches!(log.compare_and_swap(ShardId(1), 3, next(0, 4)), Swap::Unavailable(_)));
}

#[test]
fn a_full_disk_is_said() {
    let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
    let mut log = Log { file: full, length: 0, is_torn: false, tenures: BTreeMap::new() };
    assert!(matches!(log.swap(ShardId(0), 0, next(0, 1)), Swap::Unavailable(why) if why.contains("No space left")));
}
