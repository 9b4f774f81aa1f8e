//! An open device: its context, protection domain and event channel, what it can, and what it tells by itself.
//!
//! Invariant: the handles are valid from `open` to `drop`, and whatever was made of them keeps the device alive (an `Arc` in each
//! object); every asynchronous event is acknowledged as soon as it is read, so that nothing waits for us when it is destroyed.

use std::{
    ffi::CStr,
    fmt,
    io::{self, ErrorKind},
    os::fd::{BorrowedFd, RawFd},
    path::Path,
    ptr::{self, NonNull},
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{
    VerbsOptions,
    choice::{self, Candidate, Choice},
    thread_domain::ThreadDomain,
    words,
};
use crate::{
    Error, Result,
    sys::verbs::{
        self, IbvAsyncEvent, IbvCompChannel, IbvContext, IbvDevice, IbvDeviceAttr, IbvPd, IbvPortAttr, Table,
    },
};

/// A device of RDMA, opened, with the port and the address that were chosen.
pub(super) struct Device {
    context: Context,
    pd: NonNull<IbvPd>,
    /// Where the provider has them.
    thread: Option<ThreadDomain>,
    channel: NonNull<IbvCompChannel>,
    pub(super) place: Candidate,
    pub(super) limits: Limits,
    /// Ranges of memory that it was given to reach, ever.
    registered: AtomicU64,
}

/// What the device and its port can.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Requests of one queue.
    pub(super) queue_requests: u32,
    /// Completions of one completion queue.
    pub(super) completions: u32,
    /// Bytes of one message. Soft-RDMA reports 8 MiB and takes more, wrongly: so we keep to it ourselves.
    pub(super) message_bytes: u32,
    /// Path MTU, 1 to 5 for 256 to 4,096 bytes.
    pub(super) mtu: u8,
    /// Local identifier; 0 on Ethernet.
    pub(super) lid: u16,
}

/// What a device tells by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A queue pair, by its handle, has failed.
    Pair(usize, String),
    /// All that goes over the port has failed.
    All(String),
    /// So it has, and there will be no more events.
    Gone(String),
    /// Nothing that concerns us.
    Other,
}

struct Context {
    table: &'static Table,
    raw: NonNull<IbvContext>,
}

// SAFETY: libibverbs' objects belong to the process and not to a thread, and its functions lock what they share.
unsafe impl Send for Device {}
// SAFETY: as above; our own fields are never written after `open`, but for the counter, which is atomic.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the best device for these options, or one for each rail that they ask for.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is no RDMA on this machine, or none as wished; [`Error::Os`] if a device cannot be opened.
    pub(super) fn open(options: &VerbsOptions) -> Result<Vec<Arc<Device>>> {
        let table = verbs::table().map_err(|why| Error::Config(why.to_string()))?;
        let Choice { rails, spare } = choose(table, options)?;
        if !spare.is_empty() {
            tracing::info!(
                "RDMA ports {} are as near as {}: GRADWIRE_RAILS={} uses them too",
                spare.join(", "),
                rails.last().map(Candidate::name).unwrap_or_default(),
                rails.len() + spare.len()
            );
        }
        rails.into_iter().map(|place| Device::open_one(table, place)).collect()
    }

    fn open_one(table: &'static Table, place: Candidate) -> Result<Arc<Device>> {
        let context = Context::open(table, &place.device)?;
        let limits = context.limits(&place)?;
        let refused = |call| Error::os(call, format!("RDMA device {}", place.device), io::Error::last_os_error());
        // SAFETY: the context is open; the result is checked.
        let pd = unsafe { (table.alloc_pd)(context.raw.as_ptr()) };
        let pd = NonNull::new(pd).ok_or_else(|| refused("ibv_alloc_pd"))?;
        // SAFETY: the context is open; the result is checked.
        let channel = unsafe { (table.create_comp_channel)(context.raw.as_ptr()) };
        let Some(channel) = NonNull::new(channel) else {
            let error = refused("ibv_create_comp_channel");
            // SAFETY: nothing was made of the domain yet.
            unsafe { (table.dealloc_pd)(pd.as_ptr()) };
            return Err(error);
        };
        // SAFETY: both are open until `drop`, which ends the thread domain before them; the function is the table's.
        let thread = unsafe { ThreadDomain::new(context.raw.as_ptr(), pd, table.dealloc_pd) };
        let thread = thread.inspect_err(|error| say_without_thread_domain(&place, error)).ok();
        let device = Device { context, pd, thread, channel, place, limits, registered: AtomicU64::new(0) };
        for fd in [device.channel_fd(), device.async_fd()] {
            // Both are asked whether there is something, never waited for.
            let flags = fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
            flags
                .and_then(|flags| fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)))
                .map_err(|e| Error::os("fcntl(F_SETFL)", "an RDMA device's descriptor", e))?;
        }
        Ok(Arc::new(device))
    }

    /// A device of a test's table, of which no more may be used than the table's functions know.
    #[cfg(test)]
    pub(super) fn fake(
        table: &'static Table,
        raw: NonNull<IbvContext>,
        pd: NonNull<IbvPd>,
        channel: NonNull<IbvCompChannel>,
        limits: Limits,
    ) -> Device {
        let place = Candidate {
            device: "fake0".into(),
            port: 1,
            gid_index: 0,
            gid: super::address::Gid([0; 16]),
            link: super::address::Link::RoceV2,
            is_active: true,
            numa_node: None,
        };
        let context = Context { table, raw };
        Device { context, pd, thread: None, channel, place, limits, registered: AtomicU64::new(0) }
    }

    pub(super) fn table(&self) -> &'static Table {
        self.context.table
    }

    pub(super) fn context(&self) -> *mut IbvContext {
        self.context.raw.as_ptr()
    }

    pub(super) fn pd(&self) -> *mut IbvPd {
        self.pd.as_ptr()
    }

    /// In what queue pairs are made; memory is registered in [`Device::pd`], which is the same to the device.
    pub(super) fn pd_of_pairs(&self) -> *mut IbvPd {
        self.thread.as_ref().map_or(self.pd, ThreadDomain::pd).as_ptr()
    }

    pub(super) fn channel(&self) -> *mut IbvCompChannel {
        self.channel.as_ptr()
    }

    /// Counts a range of memory that it was given to reach.
    pub(super) fn count_registration(&self) {
        self.registered.fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub(super) fn registrations(&self) -> u64 {
        self.registered.load(Ordering::Relaxed)
    }

    /// Readable when a completion queue that was armed has something.
    pub(super) fn channel_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is valid and its descriptor open until `drop`.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd as RawFd) }
    }

    /// Readable when the device has something to tell.
    pub(super) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is valid and its descriptor open until `drop`.
        unsafe { BorrowedFd::borrow_raw((*self.context.raw.as_ptr()).async_fd as RawFd) }
    }

    /// Takes events of the channel out, up to `most`: that it was readable is all that they say.
    pub(super) fn drain_channel(&self, most: usize) {
        let (mut queue, mut ours) = (ptr::null_mut(), ptr::null_mut());
        let mut seen = 0;
        // SAFETY: the channel is valid; the two targets are ours. Each event is acknowledged once, for the queue that it names,
        // which lives: it is destroyed by the thread that calls this, and no event of it is left unread then by the kernel.
        unsafe {
            while seen < most && (self.table().get_cq_event)(self.channel(), &mut queue, &mut ours) == 0 {
                (self.table().ack_cq_events)(queue, 1);
                seen += 1;
            }
        }
    }

    /// Why nothing can go over the port now; nothing if it is up.
    pub(super) fn defect(&self) -> Option<String> {
        match self.context.port(&self.place) {
            Ok(port) if port.state == verbs::PORT_ACTIVE => None,
            Ok(_) => Some("its port is down".into()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// The next thing that the device has to tell.
    pub(super) fn event(&self) -> Option<Event> {
        let mut event = IbvAsyncEvent::default();
        // SAFETY: the context is valid and the target ours.
        if unsafe { (self.table().get_async_event)(self.context(), &mut event) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => None,
                _ => Some(Event::Gone(format!("the device is gone: {error}"))),
            };
        }
        // SAFETY: the event was read just now and is acknowledged once; the queue pair that it may name is not looked into.
        unsafe { (self.table().ack_async_event)(&mut event) };
        let about = words::event(event.event_type);
        Some(match event.event_type {
            verbs::EVENT_QP_FATAL | verbs::EVENT_QP_REQ_ERR | verbs::EVENT_QP_ACCESS_ERR => {
                // SAFETY: of these events the queue pair is the union's member; only its address is taken.
                Event::Pair(unsafe { event.element.qp } as usize, about)
            }
            verbs::EVENT_DEVICE_FATAL | verbs::EVENT_CQ_ERR => Event::All(about),
            // SAFETY: of these events the port is the union's member.
            verbs::EVENT_PORT_ERR if unsafe { event.element.port_num } == i32::from(self.place.port) => {
                Event::All(about)
            }
            _ => Event::Other,
        })
    }
}

/// Once a process: it is the same for each of its threads.
fn say_without_thread_domain(place: &Candidate, error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::debug!("RDMA device {} has no thread domain for us: {error}", place.device));
}

impl Context {
    fn open(table: &'static Table, name: &str) -> Result<Context> {
        let list = List::read(table)?;
        let Some(device) = list.devices().find(|device| list.name(*device) == name) else {
            return Err(Error::Config(format!(
                "RDMA device {name} is known to the kernel and not to libibverbs: {PROVIDER}"
            )));
        };
        // SAFETY: the device is of the list, which lives until the end of this function; an open device outlives it.
        let raw = unsafe { (table.open_device)(device) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let subject = format!("RDMA device {name} (may this process open /dev/infiniband/uverbs*?)");
            Error::os("ibv_open_device", subject, io::Error::last_os_error())
        })?;
        Ok(Context { table, raw })
    }

    fn port(&self, place: &Candidate) -> Result<IbvPortAttr> {
        let mut port = IbvPortAttr::default();
        // SAFETY: the context is open and the structure ours, as long as the header's or longer.
        let result = unsafe { (self.table.query_port)(self.raw.as_ptr(), place.port, (&raw mut port).cast()) };
        match result {
            0 => Ok(port),
            errno => Err(refused("ibv_query_port", place, errno)),
        }
    }

    fn limits(&self, place: &Candidate) -> Result<Limits> {
        let port = self.port(place)?;
        let mut device = IbvDeviceAttr::default();
        // SAFETY: the context is open and the structure ours, of the header's size.
        let result = unsafe { (self.table.query_device)(self.raw.as_ptr(), &mut device) };
        if result != 0 {
            return Err(refused("ibv_query_device", place, result));
        }
        Ok(Limits {
            queue_requests: device.max_qp_wr.max(0) as u32,
            completions: device.max_cqe.max(0) as u32,
            message_bytes: port.max_msg_sz.max(1),
            mtu: port.active_mtu.clamp(1, 5) as u8,
            lid: port.lid,
        })
    }
}

fn refused(call: &'static str, place: &Candidate, errno: i32) -> Error {
    let subject = format!("port {} of RDMA device {}", place.port, place.device);
    Error::os(call, subject, io::Error::from_raw_os_error(errno))
}

const PROVIDER: &str = "is its provider installed (`apt-get install ibverbs-providers`)?";

/// The devices that libibverbs knows.
struct List {
    table: &'static Table,
    raw: NonNull<*mut IbvDevice>,
    count: usize,
}

impl List {
    fn read(table: &'static Table) -> Result<List> {
        let mut count = 0;
        // SAFETY: the target is ours; the result is checked.
        let raw = unsafe { (table.get_device_list)(&mut count) };
        match NonNull::new(raw) {
            Some(raw) => Ok(List { table, raw, count: count.max(0) as usize }),
            // ENOSYS is what a kernel without RDMA gives; any other reason is as good as no device.
            None => Err(Error::Config(format!("this machine has no RDMA device ({})", io::Error::last_os_error()))),
        }
    }

    fn devices(&self) -> impl Iterator<Item = *mut IbvDevice> {
        // SAFETY: the list has so many entries (and a null behind them) until it is given back in `drop`.
        (0..self.count).map(|at| unsafe { *self.raw.as_ptr().add(at) })
    }

    fn name(&self, device: *mut IbvDevice) -> String {
        // SAFETY: the device is of this list, and its name a string as long as the list lives.
        let name = unsafe { CStr::from_ptr((self.table.get_device_name)(device)) };
        name.to_string_lossy().into_owned()
    }
}

/// The places of the best devices that both the kernel and libibverbs know.
fn choose(table: &'static Table, options: &VerbsOptions) -> Result<Choice> {
    let list = List::read(table)?;
    let known: Vec<String> = list.devices().map(|device| list.name(device)).collect();
    let mut candidates = choice::candidates(Path::new(choice::SYSFS));
    if known.is_empty() {
        return Err(Error::Config(match candidates.first() {
            None => "this machine has no RDMA device".into(),
            Some(other) => format!("RDMA device {} is not known to libibverbs: {PROVIDER}", other.device),
        }));
    }
    candidates.retain(|candidate| known.contains(&candidate.device));
    choice::choose(&candidates, options).map_err(Error::Config)
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: given back once; nothing of it is used after.
        unsafe { (self.table.free_device_list)(self.raw.as_ptr()) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: closed once, after all that was made of it (the device's other fields, and the `Arc`s of its objects).
        if unsafe { (self.table.close_device)(self.raw.as_ptr()) } != 0 {
            tracing::error!("ibv_close_device failed");
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.thread.take());
        // SAFETY: each is ended once; queues, pairs and registrations, which hold an `Arc` of this, are gone.
        let results = unsafe {
            [(self.table().destroy_comp_channel)(self.channel()), (self.table().dealloc_pd)(self.pd.as_ptr())]
        };
        if results != [0, 0] {
            tracing::error!("closing RDMA device {} left something behind: {results:?}", self.place.device);
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("place", &self.place).field("limits", &self.limits).finish_non_exhaustive()
    }
}
