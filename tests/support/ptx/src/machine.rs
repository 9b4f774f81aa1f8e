//! Runs a grid: block after block, thread after thread up to its next barrier, shuffle or end.
//!
//! Invariant: no thread passes a barrier before all threads of its block have come to that same barrier, nor a shuffle before
//! all lanes of its warp have come to that same shuffle.

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

#[cfg(test)]
mod tests {
    use crate::{Cause, Launch, Memory, Module, ParseError};

    /// A kernel of one parameter, an address in `%rd0`, around `body`.
    fn run(body: &str, grid: u32, block: u32, memory: &mut Memory, address: u64) -> Result<u64, (u32, Cause)> {
        let text = format!(
            ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n\
             .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<4>;\n\
             .shared .align 16 .b8 s[512];\nld.param.u64 %rd0, [p];\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
        );
        let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error}"));
        let launch = Launch { grid, block, instructions_max: 100_000 };
        let done = module.function("k").unwrap().launch(memory, launch, &[address]);
        done.map(|statistics| statistics.instructions).map_err(|fault| (fault.line - 9, fault.cause))
    }

    fn memory(bytes: usize) -> (Memory, u64) {
        let mut memory = Memory::default();
        let address = memory.allocate(bytes).unwrap();
        memory.fill(address, 0, bytes).unwrap();
        (memory, address)
    }

    fn words(memory: &Memory, address: u64, count: usize) -> Vec<u32> {
        let mut bytes = vec![0; 4 * count];
        memory.read(address, &mut bytes).unwrap();
        bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn shared_memory_with_and_without_its_barrier() {
        // Thread t stores t at word t and fetches the word of thread 63 - t.
        let body = |barrier: &str| {
            format!(
                "mul.wide.u32 %rd1, %r0, 4; mov.u64 %rd2, s; add.s64 %rd3, %rd2, %rd1; st.shared.u32 [%rd3], %r0;\n\
                 {barrier}\nneg.s32 %r1, %r0; add.s32 %r1, %r1, 63; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd2;\n\
                 ld.shared.u32 %r2, [%rd4]; add.s64 %rd5, %rd0, %rd1; st.global.u32 [%rd5], %r2;"
            )
        };
        let (mut memory, address) = memory(256);
        run(&body("bar.sync 0;"), 2, 64, &mut memory, address).unwrap();
        assert_eq!(words(&memory, address, 64), (0..64).rev().collect::<Vec<_>>());
        let (line, cause) = run(&body(""), 1, 64, &mut memory, address).unwrap_err();
        assert_eq!((line, cause), (4, Cause::Unwritten { address: 252, bytes: 4 }));
        let (_, cause) =
            run(&body("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 0;"), 1, 64, &mut memory, address).unwrap_err();
        assert!(matches!(cause, Cause::DivergentBarrier | Cause::Race { .. }), "{cause}");
    }

    #[test]
    fn a_shuffle_needs_its_whole_warp_and_atomics_add_up() {
        let body = "shfl.sync.down.b32 %r1, %r0, 4, 31, -1;\nmul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0;\n\
                    st.global.u32 [%rd1+8], %r1; cvt.u64.u32 %rd2, %r0; atom.add.u64 %rd3, [%rd0], %rd2;";
        let (mut memory, address) = memory(8 + 128);
        run(body, 3, 32, &mut memory, address).unwrap();
        let lanes = (0..32).map(|lane| if lane < 28 { lane + 4 } else { lane });
        assert_eq!(words(&memory, address + 8, 32), lanes.collect::<Vec<_>>());
        assert_eq!(words(&memory, address, 2), [3 * 31 * 16, 0]);
        let some = format!("setp.lt.u32 %p0, %r0, 9;\n@%p0 {body}");
        assert_eq!(run(&some, 1, 32, &mut memory, address), Err((2, Cause::DivergentShuffle)));
        assert_eq!(run(body, 1, 31, &mut memory, address), Err((1, Cause::DivergentShuffle)));
    }

    #[test]
    fn what_a_card_would_leave_undefined_is_a_fault() {
        let (mut memory, address) = memory(32);
        let mut fault = |body: &str| run(body, 1, 1, &mut memory, address).unwrap_err();
        let (line, cause) = fault("st.global.u32 [%rd0+28], %r0;\nst.global.u32 [%rd0+32], %r0;");
        assert_eq!((line, cause), (2, Cause::OutOfBounds { address: address + 32, bytes: 4 }));
        let (_, cause) = fault("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+8];");
        assert_eq!(cause, Cause::Misaligned { address: address + 8, bytes: 16 });
        assert_eq!(fault("L0:\nbra.uni L0;"), (2, Cause::TooManyInstructions(100_000)));
    }

    #[test]
    fn a_text_that_is_not_understood_is_an_error_with_its_line() {
        let error = |line: u32, text: &str| {
            let text = format!(".visible .entry k(.param .u64 p)\n{{\n.reg .b32 %r<2>;\n{text}\nret;\n}}");
            let ParseError { line: found, message } = Module::parse(&text).expect_err(&text);
            assert_eq!(found, line, "{message}");
            message
        };
        assert!(error(4, "lop3.b32 %r0, %r0, %r1, %r1, 1;").contains("lop3.b32"));
        assert!(error(4, "add.s32 %r0, %r1;").contains("operands"));
        assert!(error(4, "add.s32 %r0, %r1, %r2;").contains("%r2"));
        assert!(error(5, "mov.b32 %r0, 1;\nbra L;").contains("`L`"));
        assert!(error(4, "ld.global.v4.s33 %r0, [%r1];").contains("ld.global.v4.s33"));
        assert!(error(4, "mov.b32 %r0, 12x;").contains("12x"));
        assert!(Module::parse(".visible .entry k(").is_err() && Module::parse(".func f").is_err());
    }
}
