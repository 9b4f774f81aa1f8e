//! The ranks of one host: what they are told, and the commands that they become. It is what the launcher sends to another host.
//!
//! Invariant: no token in here: it travels beside a crew and lies in a file of the user's own, never in arguments or variables.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, process::Command};

use serde::{Deserialize, Serialize};

use super::{
    cores::{self, Dealt},
    directory::JobDirectory,
    hosts::{BindTo, MapBy},
    sweep::MARK_VARIABLE,
};
use crate::{
    Error, Result,
    mem::Topology,
    session::JobConfig,
    types::{Rank, Role},
};

/// What one host is to start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Crew {
    pub config: JobConfig,
    pub ranks: Vec<Rank>,
    /// The workers' command.
    pub command: Vec<OsString>,
    /// The servers' command, to which `--role server --rank N --rendezvous ADDRESS` is added.
    pub server_command: Vec<OsString>,
    /// Where the ranks find the rendezvous.
    pub rendezvous: String,
    pub map_by: MapBy,
    pub bind_to: BindTo,
    /// Variables that every rank gets.
    pub environment: Vec<(String, String)>,
    /// Where the ranks run; where the starting process does if nothing is said.
    pub directory: Option<PathBuf>,
    /// Whether ranks write straight to the starting process' own streams.
    pub pass_output: bool,
}

/// A rank's command, and the cores that it is bound to.
pub(super) struct Prepared {
    pub rank: Rank,
    pub command: Command,
    pub bound: Option<Vec<usize>>,
}

impl Crew {
    /// The commands of all ranks, servers first, so that workers find them waiting; and all cores that were dealt.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the directory is not there, or if ranks are to go to GPUs and there are none.
    pub fn prepare(&self, directory: &JobDirectory, mark: &str) -> Result<(Vec<Prepared>, Vec<usize>)> {
        if let Some(path) = self.directory.as_ref().filter(|path| !path.is_dir()) {
            return Err(Error::Config(format!(
                "there is no directory {} to run in; make it, or name another with --wdir",
                path.display()
            )));
        }
        let machine = Topology::discover();
        let dealt = cores::deal(self, &machine, &directory.cores_of_others())?;
        let all = dealt.values().flat_map(|dealt| dealt.cores.iter().copied()).collect();
        let mut ranks = self.ranks.clone();
        ranks.sort_by_key(|rank| (rank.role != Role::Server, rank.index));
        let prepared = ranks.into_iter().map(|rank| self.command_of(rank, &dealt, &machine, directory, mark)).collect();
        Ok((prepared, all))
    }

    fn command_of(
        &self,
        rank: Rank,
        dealt: &BTreeMap<Rank, Dealt>,
        machine: &Topology,
        directory: &JobDirectory,
        mark: &str,
    ) -> Prepared {
        let server = rank.role == Role::Server;
        let program = if server { &self.server_command } else { &self.command };
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]);
        if server {
            command.args(["--role", "server", "--rank"]).arg(rank.index.to_string());
            command.arg("--rendezvous").arg(&self.rendezvous);
        }
        let local = self.ranks.iter().filter(|other| other.role == rank.role && other.index < rank.index).count();
        let dealt = dealt.get(&rank).cloned().unwrap_or_default();
        if let Some(gpu) = dealt.gpu {
            command.env("CUDA_VISIBLE_DEVICES", gpu.to_string());
        }
        command
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("GRADWIRE_RENDEZVOUS", &self.rendezvous)
            .env("GRADWIRE_ROLE", if server { "server" } else { "worker" })
            .env("GRADWIRE_RANK", rank.index.to_string())
            .env("GRADWIRE_LOCAL_RANK", local.to_string())
            .env("GRADWIRE_WORKERS", self.config.workers.to_string())
            .env("GRADWIRE_SERVERS", self.config.servers.to_string())
            .env("GRADWIRE_TOKEN_FILE", directory.token_file())
            .env_remove("GRADWIRE_TOKEN")
            .env("GRADWIRE_CORES", cores::text(&dealt.cores))
            .env(MARK_VARIABLE, mark);
        if let Some(path) = &self.directory {
            command.current_dir(path);
        }
        let bound = match self.bind_to {
            _ if server => None, // its threads pin themselves, each to its own core
            BindTo::None => None,
            BindTo::Core => Some(dealt.cores),
            BindTo::Numa => Some(cores::node_of(&dealt.cores, machine)),
        };
        Prepared { rank, command, bound }
    }
}
