//! The training program of the tests: gradients that look random and are a function of worker, clock and element, so that
//! the simulator can compute the same.

use std::time::Duration;

use gradwire::{
    Init, Result, TensorSpec, Worker,
    cuda::Context,
    session::Member,
    transport::sim::SimRandom,
    types::Clock,
    world::{At, Program},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Steps that a full run takes.
pub const STEPS: Clock = 50;

/// The model: tensors of odd sizes, some smaller and some larger than a chunk, in two parameter groups.
pub fn model() -> Vec<TensorSpec> {
    let sizes: [&[u64]; 5] = [&[3], &[40, 50], &[7, 11, 5], &[1000], &[64]];
    let named = sizes.iter().enumerate().map(|(index, shape)| {
        TensorSpec::new(format!("layer{index}"), shape.to_vec()).init(Init::Normal(0.1)).group((index % 2) as u16)
    });
    named.collect()
}

/// What worker `worker` lacks of the model in the jobs whose workers have different parts: worker 0 lacks the second
/// tensor.
pub fn part_of_model(worker: u16) -> Vec<TensorSpec> {
    model().into_iter().enumerate().filter(|(index, _)| worker != 0 || *index != 1).map(|(_, spec)| spec).collect()
}

/// The gradient of one element of a tensor.
pub fn gradient(worker: u16, clock: Clock, tensor: &str, element: u64) -> f32 {
    let name = tensor.bytes().fold(0u64, |state, byte| state.wrapping_mul(31) + u64::from(byte));
    let mut random = SimRandom::new(name ^ (u64::from(worker) << 40) ^ (clock << 20) ^ element.wrapping_mul(0x9e37));
    (random.bits() % 2_000_001) as f32 / 1_000_000.0 - 1.0
}

/// The same, of a worker whose loss explodes at clock 10.
pub fn spoilt_gradient(worker: u16, clock: Clock, tensor: &str, element: u64) -> f32 {
    let spoilt = (worker, clock, tensor, element) == (1, 10, "layer3", 700);
    if spoilt { f32::NAN } else { gradient(worker, clock, tensor, element) }
}

/// The same in the simulated world.
pub struct Simulated {
    pub layout: gradwire::layout::Layout,
    pub gradient: fn(u16, Clock, &str, u64) -> f32,
}

impl Program for Simulated {
    fn gradient(&mut self, at: At, _parameters: &[f32], out: &mut [f32]) -> bool {
        out.fill(0.0);
        for tensor in self.layout.tensors_of(at.chunk) {
            for piece in self.layout.pieces(tensor).filter(|piece| piece.chunk == at.chunk) {
                for offset in 0..piece.len {
                    let element = piece.tensor_start + u64::from(offset);
                    out[(piece.chunk_start + offset) as usize] =
                        at.loss_scale * (self.gradient)(at.worker, at.clock, &tensor.spec.name, element);
                }
            }
        }
        true
    }

    fn received(&mut self, _at: At, _parameters: &[f32]) -> Result<(), String> {
        Ok(())
    }
}

/// A digest of all parameters.
pub fn digest(worker: &Worker, tensors: &[TensorSpec]) -> Result<u32> {
    let mut digest = 0;
    for (index, spec) in tensors.iter().enumerate() {
        let mut values = vec![0.0f32; spec.elements().unwrap() as usize];
        worker.parameters(index, &mut values)?;
        digest = crc32c::crc32c_append(digest, bytemuck::cast_slice(&values));
    }
    Ok(digest)
}

fn push_all(worker: &mut Worker, tensors: &[TensorSpec], part: &str) -> Result<()> {
    let gradient = match part {
        "spoilt" => spoilt_gradient,
        "ones" => |_, _, _: &str, _| 1.0,
        _ => gradient,
    };
    let push_only = part == "separate";
    for (index, spec) in tensors.iter().enumerate().rev() {
        let (rank, clock) = (worker.rank() as u16, worker.clock());
        let element = |element| worker.loss_scale() * gradient(rank, clock, &spec.name, element);
        let values: Vec<f32> = (0..spec.elements().unwrap()).map(element).collect();
        if push_only { worker.push(index, &values)? } else { worker.push_pull(index, &values)? }
    }
    Ok(())
}

/// Ends the clock by asking, and sleeps in poll in between; counts the times that the descriptor was not readable after a
/// no.
fn wait_in_poll(worker: &mut Worker, quiet: &mut u32) -> Result<()> {
    while !worker.test()? {
        let mut fds = [PollFd::new(worker.completion_fd()?, PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).unwrap() == 0 {
            *quiet += 1;
        }
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)).unwrap(), 1, "the end of the clock was not told");
    }
    Ok(())
}

fn join(member: Member, tensors: Vec<TensorSpec>) -> Result<Worker> {
    match std::env::var_os("WORKER_ON_GPU") {
        Some(_) => Worker::on_gpu(member, tensors, &Context::open(0)?),
        None => Worker::with_member(member, tensors),
    }
}

/// Forks; the child tries everything with its copy of the worker, drops it, and ends. The parent's worker.
fn fork_away(mut worker: Worker) -> Worker {
    // SAFETY: The child calls nothing but functions of the worker that refuse to do anything, allocates (glibc sees to malloc after a
    // fork), writes to its standard output, and ends without running anybody's exit handlers.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 0), "the child");
            worker
        }
        nix::unistd::ForkResult::Child => {
            let all = [
                worker.push_pull(0, &[1.0; 3]),
                worker.push(0, &[1.0; 3]),
                worker.push_pull_in_place(0),
                worker.push_pull_all(),
                worker.wait(),
                worker.test().map(drop),
                worker.completion_fd().map(drop),
                worker.pull(0, Duration::from_secs(1)),
                worker.parameters(0, &mut [0.0; 3]),
                worker.gradient_view(0).map(drop),
                worker.set_learning_rate(0.5),
            ];
            let refused = |outcome: &Result<()>| {
                let told = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
                told.contains(&format!("belongs to process {}", std::os::unix::process::parent_id()))
            };
            let inert = all.iter().all(refused) && refused(&worker.finish());
            // SAFETY: It ends the process and nothing else.
            unsafe { nix::libc::_exit(if inert { 0 } else { 3 }) }
        }
    }
}

/// It was told to leave.
fn leave(worker: Worker) -> Result<()> {
    println!("leaves at clock {}", worker.clock());
    worker.finish()
}

/// Stays a while when everything is done.
fn linger() {
    println!("lingering");
    std::thread::sleep(Duration::from_secs(2));
}

/// Pushes what the part pushes in a clock.
fn push(worker: &mut Worker, tensors: &[TensorSpec], part: &str, rank: u16) -> Result<()> {
    let clock = worker.clock();
    let sparse = match part {
        "sparse" => (clock + u64::from(rank)).is_multiple_of(3),
        "rare" => !clock.is_multiple_of(8),
        // Nothing but the first tensor is ever trained after that.
        "frozen" => clock > 100,
        _ => false,
    };
    if part == "schedule" {
        worker.push_pull(0, &[0.5; 3])?;
    } else if part == "pull midway" {
        // In the agreed order this one comes late: it waits for its turn while those before it have not been pushed.
        worker.push(1, &[0.5; 2000])?;
        worker.pull(0, Duration::from_secs(1))?;
        worker.push(3, &[0.5; 1000])?;
    } else if sparse {
        // Nothing is pushed but the first tensor: the others are absent, or zeros where they share a chunk.
        worker.push_pull(0, &[0.5; 3])?;
    } else {
        push_all(worker, tensors, part)?;
    }
    Ok(())
}

/// How many steps are taken, as things stand: as many as `WORKER_LAST` says, a file that comes later; or else `WORKER_STEPS`.
fn steps_to_take() -> Clock {
    let number = |text: String| text.trim().parse().expect("a number of steps");
    match std::env::var_os("WORKER_LAST") {
        Some(file) => std::fs::read_to_string(file).map_or(Clock::MAX, number),
        None => std::env::var("WORKER_STEPS").map_or(STEPS, number),
    }
}

/// Plays a part; `WORKER_STEPS`, `WORKER_LAST` and `WORKER_PAUSE_MS` change the usual run.
pub fn play(part: &str) -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let pause = Duration::from_millis(number("WORKER_PAUSE_MS").unwrap_or(0));
    let member = Member::from_environment()?;
    let rank = member.rank().index;
    let tensors = match part {
        "part" => part_of_model(rank),
        "conflict" if rank == 1 => vec![TensorSpec::new("layer0", [4])],
        _ => model(),
    };
    let mut worker = join(member, tensors.clone())?;
    println!("\ntraining from clock {}", worker.clock());
    let mut quiet = 0;
    while worker.clock() < steps_to_take() {
        let clock = worker.clock();
        match part {
            "learning rate" if clock == 20 && rank == 0 => worker.set_learning_rate(0.003)?,
            "slow" | "ones" if rank == 1 => std::thread::sleep(Duration::from_millis(3)),
            "fork" if clock == 12 => worker = fork_away(worker),
            "schedule" => worker.set_learning_rate(1.0 / (clock + 1) as f64)?,
            "forget" if clock == 10 && rank == 1 => return Ok(()),
            "nap" if clock == 10 && rank == 1 => std::thread::sleep(Duration::from_secs(3)),
            "hang" if clock == 10 && rank == 1 => std::thread::sleep(Duration::from_secs(3600)),
            _ => {}
        }
        if worker.should_leave() {
            return leave(worker);
        }
        let pushed = push(&mut worker, &tensors, part, rank);
        let stepped = pushed.and_then(|()| match part {
            "polled" => wait_in_poll(&mut worker, &mut quiet),
            _ => worker.wait(),
        });
        if let Err(gradwire::Error::Left { .. }) = stepped {
            return leave(worker);
        }
        stepped?;
        if part == "separate" {
            worker.pull(worker.clock(), Duration::from_secs(30))?;
            assert_eq!(worker.version(), worker.clock());
        }
        if clock == 10 {
            println!("at clock 10");
        }
        if std::env::var_os("WORKER_TELLS").is_some() {
            println!("begins clock {}", worker.clock());
        }
        std::thread::sleep(pause);
    }
    assert!(part != "polled" || quiet > 0, "the descriptor was always readable");
    if part == "linger" {
        linger();
    }
    if part == "midway" {
        worker.push_pull(1, &[0.5; 2000])?;
        return worker.finish();
    }
    if part == "too early" {
        let error = worker.pull(worker.clock() + 5, Duration::from_millis(300)).unwrap_err();
        println!("pulled too early: {error}");
        assert_eq!(worker.version(), worker.clock(), "what there is came all the same");
    }
    println!("digest {:08x}", digest(&worker, &tensors)?);
    worker.finish()
}
