//! The rendezvous as the launcher holds it: started, given orders, closed.
//!
//! Invariant: an order is carried out on the rendezvous' thread, in the order in which it was given; dropping the handle ends the
//! thread.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
};

use super::{Address, connection::listen, hub::Hub, notice::Notice, notify::Notify};
use crate::{
    Error, Result,
    layout::Layout,
    session::{JobConfig, TenureStore},
    types::{Clock, Rank},
    wire::JobToken,
};

/// Is told what happens, on the rendezvous' thread.
pub type NoticeSink = Box<dyn FnMut(Notice) + Send>;

/// Writes the manifest of a checkpoint of this layout whose parts are all on the disk, given in the order of their shards; on a
/// thread of its own.
pub type CheckpointSink = Box<dyn FnMut(Clock, Vec<serde_json::Value>, &Layout) -> Result<()> + Send>;

/// What a rendezvous is started with.
pub struct RendezvousOptions {
    /// Where to listen; port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// Ranks whose processes the caller starts itself: one that joins as "any rank" never gets one of these.
    pub reserved: BTreeSet<Rank>,
    /// Is told what happens.
    pub on_notice: NoticeSink,
    /// Completes checkpoints.
    pub on_checkpoint: CheckpointSink,
    /// Where tenures are written down; a job with one copy of each shard needs none.
    pub tenures: Option<Box<dyn TenureStore>>,
}

/// What the launcher orders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// A checkpoint at the next clock.
    Checkpoint,
    /// A checkpoint at the next clock, with which every rank ends; ends without one where none can be written.
    CheckpointAndStop(String),
    /// Every rank ends now.
    Stop(String),
    /// Every rank hears why the job has failed.
    Fail(String),
    /// A rank's process has ended, and how.
    Gone(Rank, String),
    /// A server that was wanted cannot be started, and why.
    NotStarted(Rank, String),
    /// The launcher's metrics are read at this address.
    MetricsAt(SocketAddr),
    /// The last messages leave, then the port closes.
    Close,
}

/// A running rendezvous. Dropping it closes the port.
pub struct Rendezvous {
    listening: SocketAddr,
    orders: Sender<Order>,
    notify: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl Rendezvous {
    /// Opens the port (one of the job's, if other hosts are to call and none was chosen) and starts the thread.
    pub fn start(config: JobConfig, token: JobToken, options: RendezvousOptions) -> Result<Rendezvous> {
        let subject = || format!("the rendezvous port {}", options.listen);
        let listener = listen(options.listen, config.ports).map_err(|e| Error::os("bind", subject(), e))?;
        listener.set_nonblocking(true).map_err(|e| Error::os("fcntl", subject(), e))?;
        let listening = listener.local_addr().map_err(|e| Error::os("getsockname", subject(), e))?;
        let (orders, orders_in) = channel();
        let notify = Arc::new(Notify::new()?);
        let mut hub = Hub::new(config, token, options, (listener, orders_in, Arc::clone(&notify)))?;
        let thread = std::thread::Builder::new()
            .name("rendezvous".into())
            .spawn(move || hub.run())
            .map_err(|e| Error::os("pthread_create", "the rendezvous", e))?;
        Ok(Rendezvous { listening, orders, notify, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn listening(&self) -> SocketAddr {
        self.listening
    }

    /// Where processes of this machine reach it.
    pub fn address(&self) -> Address {
        let mut address = self.listening;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() {
                std::net::Ipv4Addr::LOCALHOST.into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        address.into()
    }

    /// Gives an order; it is carried out on the rendezvous' thread.
    pub fn order(&self, order: Order) {
        // The thread ends only on `Close`, after which there is nothing left to order.
        let _ = self.orders.send(order);
        self.notify.wake();
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        self.order(Order::Close);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
