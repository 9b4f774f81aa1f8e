//! The flags of `gradwire run` that say on which hosts a job runs and how its ranks are laid over them.
//!
//! Invariant: what ranks on other hosts get of this environment is named here, one by one.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::{
    Error, Result,
    launch::{BindTo, JobOptions, MapBy, OutputTo, parse_hosts, read_hostfile},
    session::RANK_VARIABLES,
};

#[derive(Args)]
#[command(next_help_heading = "Hosts")]
pub(super) struct HostArguments {
    /// Hosts as ssh knows them, each with its number of workers or as many as it has cores; `localhost` is this machine.
    #[arg(long, visible_alias = "host", value_name = "HOST[:N],…", conflicts_with = "hostfile")]
    hosts: Option<String>,
    /// A file with a host a line, as `node1 slots=4`.
    #[arg(long, value_name = "FILE")]
    hostfile: Option<PathBuf>,
    /// How workers are laid out: host after host, over the hosts in turn, or over each host's NUMA nodes or GPUs in turn.
    #[arg(long, value_name = "WHAT", default_value = "slot")]
    map_by: MapByArgument,
    /// What a worker may run on: everything (it is told its cores), its own cores, or all of its NUMA node.
    #[arg(long, value_name = "WHAT", default_value = "none")]
    bind_to: BindToArgument,
    /// Let hosts take more workers than they have slots.
    #[arg(long)]
    oversubscribe: bool,
    /// A variable for every rank: with the value given, or with this environment's.
    #[arg(short = 'x', long = "env", value_name = "NAME[=VALUE]")]
    variables: Vec<String>,
    /// The directory in which ranks run [default: this one, on every host].
    #[arg(long, visible_alias = "workdir", value_name = "DIR")]
    wdir: Option<PathBuf>,
    /// The command that reaches a host, with its options, such as `ssh -F config`.
    #[arg(long, value_name = "COMMAND", env = "GRADWIRE_SSH", default_value = "ssh")]
    ssh: String,
    /// gradwire on the other hosts, where it is not at the same place as here.
    #[arg(long, value_name = "PATH")]
    remote_gradwire: Option<PathBuf>,
    /// Write each rank's output to files in this directory (w0.out, w0.err) instead of onto the screen.
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum MapByArgument {
    Slot,
    Node,
    Numa,
    Gpu,
}

#[derive(Clone, Copy, ValueEnum)]
enum BindToArgument {
    None,
    Core,
    Numa,
}

impl HostArguments {
    /// Puts what the flags say into a job's options.
    pub fn apply(self, options: &mut JobOptions) -> Result<()> {
        options.hosts = match (&self.hosts, &self.hostfile) {
            (Some(text), _) => parse_hosts(text)?,
            (None, Some(path)) => read_hostfile(path)?,
            (None, None) => Vec::new(),
        };
        options.map_by = match self.map_by {
            MapByArgument::Slot => MapBy::Slot,
            MapByArgument::Node => MapBy::Node,
            MapByArgument::Numa => MapBy::Numa,
            MapByArgument::Gpu => MapBy::Gpu,
        };
        options.bind_to = match self.bind_to {
            BindToArgument::None => BindTo::None,
            BindToArgument::Core => BindTo::Core,
            BindToArgument::Numa => BindTo::Numa,
        };
        options.oversubscribe = self.oversubscribe;
        options.ssh = self.ssh.split_whitespace().map(str::to_owned).collect();
        options.remote_executable = self.remote_gradwire;
        options.working_directory = self.wdir;
        let own = RANK_VARIABLES.iter().filter_map(|name| Some((name.to_string(), std::env::var(name).ok()?)));
        options.environment = own.collect();
        for variable in &self.variables {
            options.environment.push(match variable.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => {
                    let absent = |_| Error::Config(format!("-x {variable}: this environment has no such text"));
                    (variable.clone(), std::env::var(variable).map_err(absent)?)
                }
            });
        }
        if let Some(directory) = self.output_dir {
            options.output = OutputTo::Files(directory);
        }
        Ok(())
    }
}
