//! Runs a grid: block after block, thread after thread up to its next barrier, shuffle or end.
//!
//! Invariant: no thread passes a barrier before all threads of its block have come to that same barrier, nor a shuffle before all
//! lanes of its warp have come to that same shuffle.

use crate::{
    Cause, Fault, Function, Memory,
    instruction::Operation,
    shared::Shared,
    thread::{State, Thread},
};

const WARP: usize = 32;

/// How a kernel is to be started.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Instructions that all threads may run together before the launch counts as endless.
    pub instructions_max: u64,
}

/// What a launch that ended well took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions run by all threads together.
    pub instructions: u64,
}

struct Block<'a> {
    function: &'a Function,
    memory: &'a mut Memory,
    shared: Shared,
    arguments: &'a [u64],
    launch: Launch,
    index: u32,
    threads: Vec<Thread>,
    instructions_left: u64,
}

impl Function {
    /// Runs the kernel; of each argument as many low bytes are taken as its parameter has.
    ///
    /// # Errors
    ///
    /// The first [`Fault`]. Memory is then as the kernel left it.
    pub fn launch(&self, memory: &mut Memory, launch: Launch, arguments: &[u64]) -> Result<Statistics, Fault> {
        let refuse = |cause: String| Fault {
            kernel: self.name.clone(),
            line: 0,
            block: 0,
            thread: 0,
            cause: Cause::Launch(cause),
        };
        if arguments.len() != self.parameters.len() {
            let (given, wanted) = (arguments.len(), self.parameters.len());
            return Err(refuse(format!("{given} arguments for {wanted} parameters")));
        }
        if launch.grid == 0 || launch.block == 0 || launch.block > self.threads_max {
            let max = self.threads_max;
            return Err(refuse(format!("{} blocks of {} threads; 1 to {max} are allowed", launch.grid, launch.block)));
        }
        let mut left = launch.instructions_max;
        for index in 0..launch.grid {
            let ids = |thread| [thread, index, launch.block, launch.grid].map(u64::from);
            let thread =
                |thread| Thread { state: State::Ready, next: 0, ids: ids(thread), registers: vec![0; self.registers] };
            let mut block = Block {
                function: self,
                memory: &mut *memory,
                shared: Shared::new(self.shared_bytes),
                arguments,
                launch,
                index,
                threads: (0..launch.block).map(thread).collect(),
                instructions_left: left,
            };
            block.run()?;
            left = block.instructions_left;
        }
        Ok(Statistics { instructions: launch.instructions_max - left })
    }
}

impl Block<'_> {
    fn fault(&self, thread: usize, at: usize, cause: Cause) -> Fault {
        Fault {
            kernel: self.function.name.clone(),
            line: self.function.instructions.get(at).map_or(0, |instruction| instruction.line),
            block: self.index,
            thread: thread as u32,
            cause,
        }
    }

    fn run(&mut self) -> Result<(), Fault> {
        loop {
            for first in (0..self.threads.len()).step_by(WARP) {
                self.run_warp(first, (first + WARP).min(self.threads.len()))?;
            }
            let State::AtBarrier(at) = self.threads[0].state else {
                let waits = self.threads.iter().position(|thread| matches!(thread.state, State::AtBarrier(_)));
                let Some(waits) = waits else { return Ok(()) };
                return Err(self.fault(waits, self.threads[waits].next - 1, Cause::DivergentBarrier));
            };
            if let Some(other) = self.threads.iter().position(|thread| thread.state != State::AtBarrier(at)) {
                return Err(self.fault(other, at - 1, Cause::DivergentBarrier));
            }
            self.shared.turn += 1;
            self.threads.iter_mut().for_each(|thread| thread.state = State::Ready);
        }
    }

    /// Until every lane stands at a barrier or has ended.
    fn run_warp(&mut self, first: usize, end: usize) -> Result<(), Fault> {
        loop {
            for thread in first..end {
                if self.threads[thread].state == State::Ready {
                    self.run_thread(thread)?;
                }
            }
            let lanes = &self.threads[first..end];
            let Some(waits) = lanes.iter().position(|lane| matches!(lane.state, State::AtShuffle(_))) else {
                return Ok(());
            };
            let (state, at) = (lanes[waits].state, lanes[waits].next - 1);
            if lanes.len() < WARP || lanes.iter().any(|lane| lane.state != state) {
                return Err(self.fault(first + waits, at, Cause::DivergentShuffle));
            }
            self.shuffle(first, at)?;
        }
    }

    /// `shfl.sync.down.b32 target, value, distance, 31, -1` of a whole warp: a lane whose source would lie past the end keeps
    /// its own value.
    fn shuffle(&mut self, first: usize, at: usize) -> Result<(), Fault> {
        let instruction = &self.function.instructions[at];
        let mut results = [0; WARP];
        for (lane, result) in results.iter_mut().enumerate() {
            let thread = &self.threads[first + lane];
            let [_, distance, clamp, mask] = [0, 1, 2, 3].map(|index| thread.value(instruction.sources[index]));
            if clamp != 31 || mask as u32 != u32::MAX {
                let cause = Cause::Launch("a shuffle of part of a warp is unknown here".into());
                return Err(self.fault(first + lane, at, cause));
            }
            let from = lane + (distance as usize & 31);
            let source = &self.threads[first + if from < WARP { from } else { lane }];
            *result = source.value(instruction.sources[0]) & 0xFFFF_FFFF;
        }
        for (lane, result) in results.into_iter().enumerate() {
            let thread = &mut self.threads[first + lane];
            thread.registers[instruction.targets[0] as usize] = result;
            thread.state = State::Ready;
        }
        Ok(())
    }

    /// Until the thread's next barrier, shuffle or end.
    fn run_thread(&mut self, index: usize) -> Result<(), Fault> {
        let function = self.function;
        let mut at = self.threads[index].next;
        let thread = &mut self.threads[index];
        thread.state = loop {
            let Some(instruction) = function.instructions.get(at) else { break State::Done };
            if self.instructions_left == 0 {
                let cause = Cause::TooManyInstructions(self.launch.instructions_max);
                return Err(self.fault(index, at, cause));
            }
            self.instructions_left -= 1;
            at += 1;
            if let Some(guard) = instruction.guard
                && thread.registers[guard.register as usize] != guard.wanted
            {
                continue;
            }
            match instruction.operation {
                Operation::Branch(target) => at = target,
                Operation::Barrier => break State::AtBarrier(at),
                Operation::ShuffleDown => break State::AtShuffle(at),
                Operation::Return => break State::Done,
                _ => {
                    let step = thread.step(instruction, self.memory, &mut self.shared, self.arguments);
                    if let Err(cause) = step {
                        return Err(self.fault(index, at - 1, cause));
                    }
                }
            }
        };
        thread.next = at;
        Ok(())
    }
}
