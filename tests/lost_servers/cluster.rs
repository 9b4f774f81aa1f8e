//! An etcd cluster of three processes on loopback, for a test.
//!
//! Invariant: a member listens on loopback only, and none is left when the cluster is dropped.

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use gradwire::session::EtcdStore;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Cluster {
    directory: tempfile::TempDir,
    /// Of each member: where clients call, and where the others do.
    ports: Vec<(u16, u16)>,
    members: Vec<Option<Child>>,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn address(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

impl Cluster {
    /// Three members that have found each other.
    pub fn start() -> Cluster {
        let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
        let mut cluster = Cluster { directory: tempfile::tempdir().unwrap(), ports, members: vec![None, None, None] };
        (0..3).for_each(|index| cluster.start_member(index));
        cluster.wait_until_it_serves();
        cluster
    }

    pub fn urls(&self) -> Vec<String> {
        self.ports.iter().map(|(client, _)| address(*client)).collect()
    }

    fn home(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("m{index}"))
    }

    /// Starts a member, with what it knew when it was killed.
    pub fn start_member(&mut self, index: usize) {
        let all: Vec<String> = (0..3).map(|other| format!("m{other}={}", address(self.ports[other].1))).collect();
        let (client, peer) = (address(self.ports[index].0), address(self.ports[index].1));
        let mut command = Command::new("etcd");
        command.arg("--name").arg(format!("m{index}")).arg("--data-dir").arg(self.home(index));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &all.join(","), "--logger", "zap"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("etcd must be there: apt-get install etcd-server");
        self.members[index] = Some(child);
    }

    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn wait_until_it_serves(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = EtcdStore::open(&self.urls(), "probe", 0) {
            assert!(Instant::now() < deadline, "etcd does not serve: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The member that leads.
    pub fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leads = (0..3).filter(|index| self.members[*index].is_some()).find(|index| {
                let status = self.status(*index).unwrap_or_default();
                status["leader"].is_string() && status["leader"] == status["header"]["member_id"]
            });
            match leads {
                Some(index) => return index,
                None => assert!(Instant::now() < deadline, "no member of etcd leads"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn status(&self, index: usize) -> Option<Value> {
        let status = address(self.ports[index].0) + "/v3/maintenance/status";
        let text = ureq::post(status).send("{}").ok()?.body_mut().read_to_string().ok()?;
        serde_json::from_str(&text).ok()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..3).for_each(|index| self.kill(index));
    }
}
