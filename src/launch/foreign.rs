//! Somebody else's launcher around us: mpirun of Open MPI or MPICH, srun, torchrun. Which rank of how many this process is, and what
//! names the run.
//!
//! Invariant: pure but for `surroundings`; the innermost launcher is the one that counts.
#![forbid(unsafe_code)]

use crate::{Error, Result, session::JobConfig, types::Rank};

/// What a launcher of another kind has told this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Its name, for people.
    pub launcher: &'static str,
    /// Our rank among all processes.
    pub rank: u16,
    /// How many there are.
    pub size: u16,
    /// Our rank among those of this host.
    pub local_rank: u16,
    /// Whether all are on this host.
    pub one_host: bool,
    /// What tells this run from others; the same in every process of it. `None` if the launcher has no such name.
    pub run: Option<String>,
    /// Where torchrun's processes meet (`MASTER_ADDR`, `MASTER_PORT`).
    pub master: Option<(String, u16)>,
}

/// How one launcher says it: its name, a variable that must be there, then rank, size, rank on this host, ranks on this host.
const LAUNCHERS: [(&str, &str, [&str; 4]); 5] = [
    ("torchrun", "TORCHELASTIC_RUN_ID", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
    (
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
    ),
    ("srun", "SLURM_STEP_ID", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"]),
    ("mpirun (PMI)", "PMI_RANK", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]),
    ("the environment", "RANK", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
];

/// The launcher around this process, if there is one.
///
/// # Errors
///
/// [`Error::Config`] naming a variable that holds no number, or numbers that contradict each other.
pub fn surroundings() -> Result<Option<Foreign>> {
    let mut found = read(|name| std::env::var(name).ok())?;
    if let Some(foreign) = found.as_mut().filter(|foreign| foreign.run.is_none()) {
        foreign.run = hydra_run(nix::unistd::getppid().as_raw());
    }
    Ok(found)
}

/// MPICH's launcher gives its processes no name of the run, but its proxy, our parent, was told where mpiexec listens.
fn hydra_run(parent: i32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{parent}/cmdline")).ok()?;
    let mut words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    words.find(|word| word == "--control-port")?;
    Some(format!("hydra-{}", words.next()?))
}

fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Foreign>> {
    let inside = |(_, sign, names): &&(&str, &str, [&str; 4])| {
        variable(sign).is_some() && names[..2].iter().all(|name| variable(name).is_some())
    };
    let Some((launcher, _, [rank, size, local_rank, local_size])) = LAUNCHERS.iter().find(inside) else {
        return Ok(None);
    };
    let number = |name: &str| -> Result<Option<u16>> {
        let Some(text) = variable(name) else { return Ok(None) };
        let parsed = text.parse().map(Some);
        parsed.map_err(|_| Error::Config(format!("{name} of {launcher} is `{text}`, which is no number of ranks")))
    };
    let (rank, size) = (number(rank)?.unwrap_or_default(), number(size)?.unwrap_or_default());
    if rank >= size {
        return Err(Error::Config(format!("{launcher} says that this is rank {rank} of {size}")));
    }
    let one_host = match *launcher {
        "srun" => {
            ["SLURM_STEP_NUM_NODES", "SLURM_NNODES"].iter().find_map(|name| variable(name)).as_deref() == Some("1")
        }
        _ => number(local_size)? == Some(size),
    };
    let run = match *launcher {
        "torchrun" => {
            let part = |name| variable(name).unwrap_or_default();
            let port = part("MASTER_PORT");
            Some(format!("torch-{}-{port}-{}", part("TORCHELASTIC_RUN_ID"), part("TORCHELASTIC_RESTART_COUNT")))
        }
        "mpirun (Open MPI)" => {
            let name = variable("PMIX_NAMESPACE").or_else(|| variable("OMPI_MCA_ess_base_jobid"));
            name.map(|name| format!("ompi-{name}"))
        }
        "srun" => Some(format!(
            "slurm-{}.{}",
            variable("SLURM_JOB_ID").unwrap_or_default(),
            variable("SLURM_STEP_ID").unwrap_or_default()
        )),
        _ => None,
    };
    let master = variable("MASTER_ADDR").zip(variable("MASTER_PORT").and_then(|port| port.parse().ok()));
    let local_rank = number(local_rank)?.unwrap_or_default();
    Ok(Some(Foreign { launcher, rank, size, local_rank, one_host, run, master }))
}

impl Foreign {
    /// Which rank of the job this process is: the first ones are servers, the others workers.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with the sum if the launcher has started another number of processes than the job has ranks.
    pub fn role(&self, config: &JobConfig) -> Result<Rank> {
        let ranks = u32::from(config.servers) + u32::from(config.workers);
        if ranks != u32::from(self.size) {
            return Err(Error::Config(format!(
                "{} has started {} processes, and the job has {} servers and {} workers: {ranks}",
                self.launcher, self.size, config.servers, config.workers
            )));
        }
        Ok(match self.rank.checked_sub(config.servers) {
            Some(worker) => Rank::worker(worker),
            None => Rank::server(self.rank),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(variables: &[(&str, &str)]) -> Result<Option<Foreign>> {
        read(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn every_launcher_is_understood() {
        let open = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "6"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "77"),
            // Within a batch job of Slurm's, whose own numbers are the batch step's.
            ("SLURM_STEP_ID", "4294967291"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
        ];
        let told_open = told(&open).unwrap().unwrap();
        assert_eq!((told_open.rank, told_open.size, told_open.local_rank, told_open.one_host), (3, 6, 1, false));
        assert_eq!(told_open.run.as_deref(), Some("ompi-77"));
        let slurm = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_ID", "12"),
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "6"),
            ("SLURM_STEP_NUM_NODES", "1"),
            ("PMI_RANK", "5"),
            ("PMI_SIZE", "6"),
        ];
        let told_slurm = told(&slurm).unwrap().unwrap();
        assert_eq!((told_slurm.launcher, told_slurm.rank, told_slurm.one_host), ("srun", 5, true));
        assert_eq!(told_slurm.run.as_deref(), Some("slurm-12.0"));
        let hydra = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2")];
        assert!(told(&hydra).unwrap().unwrap().one_host);
        let torch = [
            ("TORCHELASTIC_RUN_ID", "none"),
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "node1"),
            ("MASTER_PORT", "29500"),
        ];
        let told_torch = told(&torch).unwrap().unwrap();
        assert_eq!(told_torch.master, Some(("node1".into(), 29500)));
        assert_eq!(told(&[("RANK", "1")]).unwrap(), None, "half a word");
        let text = told(&[("PMI_RANK", "x"), ("PMI_SIZE", "2")]).unwrap_err().to_string();
        assert!(text.contains("PMI_RANK"), "{text}");
        assert!(told(&[("PMI_RANK", "2"), ("PMI_SIZE", "2")]).is_err());
    }

    #[test]
    fn the_first_ranks_are_servers() {
        let foreign =
            |rank| Foreign { launcher: "srun", rank, size: 5, local_rank: 0, one_host: true, run: None, master: None };
        let config = JobConfig { servers: 2, workers: 3, ..JobConfig::default() };
        let ranks: Vec<Rank> = (0..5).map(|rank| foreign(rank).role(&config).unwrap()).collect();
        let wanted = [Rank::server(0), Rank::server(1), Rank::worker(0), Rank::worker(1), Rank::worker(2)];
        assert_eq!(ranks, wanted);
        let fewer = JobConfig { workers: 2, ..config };
        let text = foreign(0).role(&fewer).unwrap_err().to_string();
        assert!(text.contains("srun has started 5 processes, and the job has 2 servers and 2 workers: 4"), "{text}");
    }
}
