//! A disk that forgets: it does everything on the real one, and keeps beside it what a machine that lost power at this moment
//! would have kept, so that a test can fail or stop it at any operation.
//!
//! The model: bytes are safe when their file was synced, names when their directory was; of what was not synced any part may
//! have reached the disk, except that the changes to one directory reach it in their order (as journals do).
//!
//! Invariant: nothing is remembered after the crash, and what was synced before it always is.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use super::super::disk::{Disk, DiskFile, SYSTEM};

/// What goes wrong at the operation with the given number, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The operation fails, after a write half done; all later ones succeed.
    Error(usize),
    /// Nothing happens from this operation on.
    Crash(usize),
    /// Files are said to be synced, and are not.
    FileSyncLies,
    /// Directories are said to be synced, and are not.
    DirectorySyncLies,
}

/// How much of what was not synced survives a crash.
#[derive(Clone, Copy, Debug)]
pub enum Survival {
    Nothing,
    Everything,
    /// Parts that depend on the seed.
    Some(u64),
}

type Inode = usize;

#[derive(Clone, Debug)]
enum Change {
    Add(String, Inode),
    Remove(String),
    Rename(String, String),
}

#[derive(Clone, Debug)]
enum Node {
    File { durable: Vec<u8>, bytes: Vec<u8> },
    Directory { durable: BTreeMap<String, Inode>, pending: Vec<Change> },
}

struct Model {
    fault: Fault,
    operations: usize,
    /// What the fault hit: kind of operation.
    hit: Vec<&'static str>,
    nodes: Vec<Node>,
    /// The names as the running system sees them.
    names: BTreeMap<PathBuf, Inode>,
}

/// The disk under one directory, which is empty and durable when it is made.
#[derive(Clone)]
pub struct ModelDisk(Arc<Mutex<Model>>);

struct ModelFile {
    disk: ModelDisk,
    inode: Inode,
    real: HastyFile,
}

fn apply(entries: &mut BTreeMap<String, Inode>, change: &Change) {
    match change {
        Change::Add(name, inode) => drop(entries.insert(name.clone(), *inode)),
        Change::Remove(name) => drop(entries.remove(name)),
        Change::Rename(source, target) => {
            let inode = entries.remove(source).expect("changes of a directory survive in order");
            entries.insert(target.clone(), inode);
        }
    }
}

fn split(path: &Path) -> (PathBuf, String) {
    (path.parent().unwrap().into(), path.file_name().unwrap().to_str().unwrap().into())
}

impl ModelDisk {
    pub fn new(root: &Path, fault: Fault) -> ModelDisk {
        let nodes = vec![Node::Directory { durable: BTreeMap::new(), pending: Vec::new() }];
        ModelDisk(Arc::new(Mutex::new(Model {
            fault,
            operations: 0,
            hit: Vec::new(),
            nodes,
            names: BTreeMap::from([(root.into(), 0)]),
        })))
    }

    /// Arms another fault, counted from here.
    pub fn arm(&self, fault: Fault) {
        let mut model = self.0.lock().unwrap();
        model.operations = 0;
        model.hit.clear();
        model.fault = fault;
    }

    pub fn operations(&self) -> usize {
        self.0.lock().unwrap().operations
    }

    /// The operations that were refused, by their kinds.
    pub fn hit(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().hit.clone()
    }

    /// Counts an operation and says whether it may happen.
    fn step(&self, kind: &'static str) -> io::Result<()> {
        let mut model = self.0.lock().unwrap();
        let now = model.operations;
        model.operations += 1;
        if matches!(model.fault, Fault::Error(at) if at == now) || matches!(model.fault, Fault::Crash(at) if at <= now)
        {
            model.hit.push(kind);
        }
        match model.fault {
            Fault::Error(at) if at == now => Err(io::Error::other("injected error")),
            Fault::Crash(at) if at <= now => Err(io::Error::other("injected crash")),
            _ => Ok(()),
        }
    }

    fn change(&self, directory: &Path, change: Change) {
        let mut model = self.0.lock().unwrap();
        let inode = model.names[directory];
        let Node::Directory { pending, .. } = &mut model.nodes[inode] else { panic!("{directory:?} is a file") };
        pending.push(change);
    }

    fn add(&self, path: &Path, node: Node) -> Inode {
        let (directory, name) = split(path);
        let inode = {
            let mut model = self.0.lock().unwrap();
            model.nodes.push(node);
            let inode = model.nodes.len() - 1;
            model.names.insert(path.into(), inode);
            inode
        };
        self.change(&directory, Change::Add(name, inode));
        inode
    }

    fn remove(&self, path: &Path) {
        let (directory, name) = split(path);
        self.0.lock().unwrap().names.remove(path);
        self.change(&directory, Change::Remove(name));
    }

    /// Writes what the machine finds after the crash into the empty directory `target`.
    pub fn restart(&self, survival: Survival, target: &Path) {
        let model = self.0.lock().unwrap();
        let mut random = match survival {
            Survival::Some(seed) => seed,
            _ => 0,
        };
        model.restore(0, target, survival, &mut random);
    }
}

impl Model {
    fn restore(&self, inode: Inode, target: &Path, survival: Survival, random: &mut u64) {
        // Of `count` things that were not synced, how many survive.
        let mut survivors = |count: usize| match survival {
            Survival::Nothing => 0,
            Survival::Everything => count,
            Survival::Some(_) => {
                *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (*random >> 33) as usize % (count + 1)
            }
        };
        match &self.nodes[inode] {
            Node::File { durable, bytes } => {
                let unsynced = &bytes[durable.len()..];
                let mut found = durable.clone();
                let kept = survivors(unsynced.len());
                found.extend_from_slice(&unsynced[..kept]);
                // A length may reach the disk before the bytes do.
                found.resize(found.len() + survivors(unsynced.len() - kept), 0);
                fs::write(target, found).unwrap();
            }
            Node::Directory { durable, pending } => {
                let mut entries = durable.clone();
                let kept = survivors(pending.len());
                pending[..kept].iter().for_each(|change| apply(&mut entries, change));
                fs::create_dir_all(target).unwrap();
                for (name, inode) in entries {
                    self.restore(inode, &target.join(name), survival, random);
                }
            }
        }
    }
}

impl Disk for ModelDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step("create_dir")?;
        SYSTEM.create_dir(path)?;
        self.add(path, Node::Directory { durable: BTreeMap::new(), pending: Vec::new() });
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.step("create")?;
        let real = HastyFile(File::create(path)?);
        let inode = self.add(path, Node::File { durable: Vec::new(), bytes: Vec::new() });
        Ok(Box::new(ModelFile { disk: self.clone(), inode, real }))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.step("rename")?;
        SYSTEM.rename(source, target)?;
        let (directory, name) = split(source);
        {
            let mut model = self.0.lock().unwrap();
            let moved: Vec<_> = model.names.keys().filter(|path| path.starts_with(source)).cloned().collect();
            for path in moved {
                let inode = model.names.remove(&path).unwrap();
                let rest = path.strip_prefix(source).unwrap();
                let renamed = if rest.as_os_str().is_empty() { target.into() } else { target.join(rest) };
                model.names.insert(renamed, inode);
            }
        }
        self.change(&directory, Change::Rename(name, split(target).1));
        Ok(())
    }

    fn link(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.step("link")?;
        SYSTEM.link(source, target)?;
        let (directory, name) = split(target);
        let inode = {
            let mut model = self.0.lock().unwrap();
            let inode = model.names[source];
            model.names.insert(target.into(), inode);
            inode
        };
        self.change(&directory, Change::Add(name, inode));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step("sync_dir")?;
        let mut model = self.0.lock().unwrap();
        if model.fault == Fault::DirectorySyncLies {
            return Ok(());
        }
        let inode = model.names[path];
        let Node::Directory { durable, pending } = &mut model.nodes[inode] else { panic!("{path:?} is a file") };
        pending.drain(..).for_each(|change| apply(durable, &change));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step("remove_file")?;
        SYSTEM.remove_file(path)?;
        self.remove(path);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step("remove_dir")?;
        SYSTEM.remove_dir(path)?;
        self.remove(path);
        Ok(())
    }
}

impl DiskFile for ModelFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let step = self.disk.step("write");
        let written = match (&step, self.disk.0.lock().unwrap().fault) {
            (Ok(()), _) => bytes,
            // As a full disk does it.
            (Err(_), Fault::Error(_)) => &bytes[..bytes.len() / 2],
            (Err(_), _) => &[],
        };
        self.real.write(written)?;
        let mut model = self.disk.0.lock().unwrap();
        let Node::File { bytes, .. } = &mut model.nodes[self.inode] else { unreachable!() };
        bytes.extend_from_slice(written);
        step
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.step("sync")?;
        let mut model = self.disk.0.lock().unwrap();
        if model.fault == Fault::FileSyncLies {
            return Ok(());
        }
        let Node::File { bytes, durable } = &mut model.nodes[self.inode] else { unreachable!() };
        durable.clone_from(bytes);
        Ok(())
    }
}

/// The real disk without waiting for it, for what happens after the crash that is tested.
pub struct Hasty;

/// A file whose bytes are there when they have been written, durable or not.
struct HastyFile(File);

impl Disk for Hasty {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        SYSTEM.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(HastyFile(File::create(path)?)))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        SYSTEM.rename(source, target)
    }

    fn link(&self, source: &Path, target: &Path) -> io::Result<()> {
        SYSTEM.link(source, target)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        SYSTEM.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        SYSTEM.remove_dir(path)
    }
}

impl DiskFile for HastyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The model itself: what is not synced is lost, what is synced is not.
#[test]
fn the_model_forgets_what_was_not_synced() {
    let live = tempfile::tempdir().unwrap();
    let disk = ModelDisk::new(live.path(), Fault::None);
    let found = |survival| {
        let after = tempfile::tempdir().unwrap();
        disk.restart(survival, after.path());
        fs::read(after.path().join("b")).ok()
    };
    let mut file = disk.create(&live.path().join("a")).unwrap();
    file.write(b"bytes").unwrap();
    disk.rename(&live.path().join("a"), &live.path().join("b")).unwrap();
    assert_eq!(found(Survival::Nothing), None);
    assert_eq!(found(Survival::Everything), Some(b"bytes".into()));
    disk.sync_dir(live.path()).unwrap();
    assert_eq!(found(Survival::Nothing), Some(b"".into()));
    file.sync().unwrap();
    assert_eq!(found(Survival::Nothing), Some(b"bytes".into()));
}
