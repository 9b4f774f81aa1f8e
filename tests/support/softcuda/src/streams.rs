//! Streams and events, and the work that is put on them.
//!
//! Invariant: positions on a stream only grow; an event has happened when its stream has done as much as was put on it before the
//! event was recorded, or is gone.

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    sync::{Arc, Once},
    time::Duration,
};

use gradwire_ptx::{Cause, Fault, Function, Launch};

use crate::state::{
    ILLEGAL_ADDRESS, INVALID_HANDLE, INVALID_VALUE, LAUNCH_FAILED, NOT_READY, State, Status, call, give, log, setting,
};

/// Instructions of one launch, at most: an interpreter does some 20 million a second.
const INSTRUCTIONS_MAX: u64 = 10_000_000_000;

/// Host addresses are numbers here, because work may be done by another thread; whoever put it there keeps them valid.
pub(crate) enum Work {
    HostToDevice {
        to: u64,
        from: usize,
        bytes: usize,
    },
    DeviceToHost {
        to: usize,
        from: u64,
        bytes: usize,
    },
    DeviceToDevice {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Fill {
        to: u64,
        value: u8,
        bytes: usize,
    },
    Launch {
        function: Arc<Function>,
        launch: Launch,
        arguments: Vec<u64>,
    },
    Call {
        function: extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Until this stream has come to this position.
    Wait {
        stream: usize,
        position: u64,
    },
}

pub(crate) struct Stream {
    device: usize,
    queue: VecDeque<Work>,
    done: u64,
}

impl Stream {
    fn new(device: usize) -> Stream {
        Stream { device, queue: VecDeque::new(), done: 0 }
    }

    /// Pieces of work that were ever put on it.
    fn position(&self) -> u64 {
        self.done + self.queue.len() as u64
    }
}

fn lateness_ms() -> usize {
    setting("SOFTCUDA_LATE", 0)
}

/// The stream that a handle means for the device that is current; the default stream is made when it is first used.
pub(crate) fn resolve(state: &mut State, handle: usize) -> Result<usize, Status> {
    let device = state.current()?;
    if handle == 0 {
        let key = usize::MAX - device;
        state.streams.entry(key).or_insert_with(|| Stream::new(device));
        return Ok(key);
    }
    if state.streams.contains_key(&handle) { Ok(handle) } else { Err(INVALID_HANDLE) }
}

/// Puts work on a stream, and does it unless all is to be late.
pub(crate) fn put(state: &mut State, handle: usize, work: Work) -> Result<(), Status> {
    let stream = resolve(state, handle)?;
    state.streams.get_mut(&stream).ok_or(INVALID_HANDLE)?.queue.push_back(work);
    if lateness_ms() == 0 {
        return advance(state, stream, u64::MAX);
    }
    static LATE: Once = Once::new();
    LATE.call_once(|| _ = std::thread::Builder::new().name("soft CUDA".into()).spawn(work_late));
    Ok(())
}

/// One piece of each stream's work every so many milliseconds, as long as the process lives: a card, too, goes on by itself.
fn work_late() {
    loop {
        std::thread::sleep(Duration::from_millis(lateness_ms().max(1) as u64));
        call("late work", |state| {
            let streams: Vec<(usize, u64)> = state.streams.iter().map(|(key, stream)| (*key, stream.done)).collect();
            for (stream, done) in streams {
                // What goes wrong has poisoned the context, and the next call will say it.
                let _ = advance(state, stream, done + 1);
            }
            Ok(())
        });
    }
}

/// Does a stream's work up to a position.
pub(crate) fn advance(state: &mut State, stream: usize, position: u64) -> Result<(), Status> {
    loop {
        let Some(current) = state.streams.get_mut(&stream) else { return Ok(()) };
        let poison = state.devices.get(current.device).map_or(INVALID_HANDLE, |device| device.poison);
        if poison != 0 {
            return Err(poison);
        }
        if current.done >= position {
            return Ok(());
        }
        let Some(work) = current.queue.pop_front() else { return Ok(()) };
        let device = current.device;
        if let Work::Wait { stream: other, position } = work {
            // It was recorded before it was waited for, so this ends.
            advance(state, other, position)?;
        } else if let Err(fault) = run(state, device, work) {
            eprintln!("soft CUDA: {fault}");
            let outside = matches!(fault.cause, Cause::OutOfBounds { .. } | Cause::Unwritten { .. });
            let status = if outside { ILLEGAL_ADDRESS } else { LAUNCH_FAILED };
            state.devices[device].poison = status;
            return Err(status);
        }
        state.streams.get_mut(&stream).ok_or(INVALID_HANDLE)?.done += 1;
    }
}

fn run(state: &mut State, device: usize, work: Work) -> Result<(), Fault> {
    let memory = &mut state.devices[device].memory;
    let copied = match work {
        Work::HostToDevice { to, from, bytes } => {
            // SAFETY: whoever put the copy on the stream keeps these bytes readable and still until it is done.
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
            memory.write(to, bytes)
        }
        Work::DeviceToHost { to, from, bytes } => {
            // SAFETY: whoever put the copy on the stream keeps these bytes writable and to itself until it is done.
            let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            memory.read(from, bytes)
        }
        Work::DeviceToDevice { to, from, bytes } => {
            let mut buffer = vec![0; bytes];
            memory.read(from, &mut buffer).and_then(|()| memory.write(to, &buffer))
        }
        Work::Fill { to, value, bytes } => memory.fill(to, value, bytes),
        Work::Launch { function, launch, arguments } => {
            state.launches += 1;
            log(&format!("launch {}", function.name()));
            return function.launch(memory, launch, &arguments).map(|_| ());
        }
        Work::Call { function, data } => {
            function(data as *mut c_void);
            Ok(())
        }
        Work::Wait { .. } => Ok(()),
    };
    copied.map_err(|cause| Fault { kernel: "a copy".into(), line: 0, block: 0, thread: 0, cause })
}

pub(crate) fn put_launch(
    state: &mut State,
    stream: usize,
    function: Arc<Function>,
    shape: [u32; 2],
    arguments: Vec<u64>,
) -> Result<(), Status> {
    let launch = Launch { grid: shape[0], block: shape[1], instructions_max: INSTRUCTIONS_MAX };
    put(state, stream, Work::Launch { function, launch, arguments })
}

/// All work of the current device.
pub(crate) fn finish_all(state: &mut State) -> Result<(), Status> {
    let device = state.current()?;
    let own = state.streams.iter().filter(|(_, stream)| stream.device == device);
    for stream in own.map(|(key, _)| *key).collect::<Vec<_>>() {
        advance(state, stream, u64::MAX)?;
    }
    Ok(())
}

/// # Safety
///
/// `stream` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _flags: c_uint) -> Status {
    call("cuStreamCreate", |state| {
        let device = state.current()?;
        let handle = state.handle();
        state.streams.insert(handle, Stream::new(device));
        // SAFETY: the caller's word.
        unsafe { give(stream, handle) }
    })
}

/// # Safety
///
/// None is needed: a stream is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: usize) -> Status {
    call("cuStreamDestroy_v2", |state| {
        if !state.streams.contains_key(&stream) {
            return Err(INVALID_HANDLE);
        }
        let finished = advance(state, stream, u64::MAX);
        state.streams.remove(&stream);
        finished
    })
}

/// # Safety
///
/// None is needed: a stream is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: usize) -> Status {
    call("cuStreamSynchronize", |state| {
        let stream = resolve(state, stream)?;
        advance(state, stream, u64::MAX)
    })
}

/// # Safety
///
/// None is needed: the call takes no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize() -> Status {
    call("cuCtxSynchronize", finish_all)
}

/// # Safety
///
/// None is needed: a stream is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: usize) -> Status {
    call("cuStreamQuery", |state| {
        let stream = resolve(state, stream)?;
        if state.streams[&stream].queue.is_empty() { Ok(()) } else { Err(NOT_READY) }
    })
}

/// # Safety
///
/// None is needed: stream and event are numbers here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> Status {
    call("cuStreamWaitEvent", |state| match *state.events.get(&event).ok_or(INVALID_HANDLE)? {
        // An event that was never recorded holds nobody up.
        None => Ok(()),
        Some((other, position)) => put(state, stream, Work::Wait { stream: other, position }),
    })
}

/// # Safety
///
/// `function` may be called with `data` from any thread, once, until the stream's work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: usize,
    function: Option<extern "C" fn(*mut c_void)>,
    data: *mut c_void,
) -> Status {
    call("cuLaunchHostFunc", |state| {
        let function = function.ok_or(INVALID_VALUE)?;
        put(state, stream, Work::Call { function, data: data as usize })
    })
}

/// # Safety
///
/// `event` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut usize, _flags: c_uint) -> Status {
    call("cuEventCreate", |state| {
        state.current()?;
        let handle = state.handle();
        state.events.insert(handle, None);
        // SAFETY: the caller's word.
        unsafe { give(event, handle) }
    })
}

/// # Safety
///
/// None is needed: an event is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    call("cuEventDestroy_v2", |state| state.events.remove(&event).map(|_| ()).ok_or(INVALID_HANDLE))
}

/// # Safety
///
/// None is needed: event and stream are numbers here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: usize, stream: usize) -> Status {
    call("cuEventRecord", |state| {
        let stream = resolve(state, stream)?;
        let position = state.streams[&stream].position();
        *state.events.get_mut(&event).ok_or(INVALID_HANDLE)? = Some((stream, position));
        Ok(())
    })
}

/// # Safety
///
/// None is needed: an event is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: usize) -> Status {
    call("cuEventQuery", |state| {
        state.current()?;
        let happened = match *state.events.get(&event).ok_or(INVALID_HANDLE)? {
            None => true,
            Some((stream, position)) => state.streams.get(&stream).is_none_or(|stream| stream.done >= position),
        };
        if happened { Ok(()) } else { Err(NOT_READY) }
    })
}

/// # Safety
///
/// None is needed: an event is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: usize) -> Status {
    call("cuEventSynchronize", |state| {
        state.current()?;
        match *state.events.get(&event).ok_or(INVALID_HANDLE)? {
            None => Ok(()),
            Some((stream, position)) => advance(state, stream, position),
        }
    })
}

/// # Safety
///
/// `milliseconds` is valid for a write. Work takes no time that anybody would measure here: the answer is always a thousandth.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, from: usize, to: usize) -> Status {
    call("cuEventElapsedTime", |state| {
        let recorded = |event: usize| state.events.get(&event).ok_or(INVALID_HANDLE).map(Option::is_some);
        if !recorded(from)? || !recorded(to)? {
            return Err(INVALID_HANDLE);
        }
        // SAFETY: the caller's word.
        unsafe { give(milliseconds, 0.001) }
    })
}

/// How many kernels have been launched in this process: what a test counts. Not a call of the driver.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_launches() -> c_int {
    let mut launches = 0;
    call("softcuda_launches", |state| {
        launches = state.launches;
        Ok(())
    });
    launches as c_int
}
