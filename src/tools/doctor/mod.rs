//! Looks at everything that commonly goes wrong when a machine gets RDMA, and tries each fabric on itself or with a peer.
//!
//! Each part reads /proc and /sys through a [`Tree`], so that a machine which one does not have can be looked at in a test.
//!
//! Invariant: nothing here changes the machine; an item that is wrong says what mends it.

mod exchange;
mod gpu;
mod limits;
mod loopback;
mod pair;
mod probe;
mod rdma;
mod tree;

#[cfg(test)]
mod tests;

use serde::Serialize;

pub use exchange::{Figures, LATENCY_BYTES, RATE_BYTES};
pub use loopback::{Tried, try_fabrics};
pub use pair::{Listener, PORT, Reached, call};
pub use tree::Tree;

use crate::mem::Topology;

/// How an item was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// It keeps something from working, or from working well.
    Wrong,
    /// This machine does not have it, and does without.
    #[serde(rename = "not here")]
    NotHere,
}

impl Verdict {
    /// The word for people.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Fine => "fine",
            Verdict::Wrong => "WRONG",
            Verdict::NotHere => "not here",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What kind of thing ("memlock", "port").
    pub topic: &'static str,
    /// Which one, where there can be several ("mlx5_0/1").
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// How it was found.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// The line that mends it, or makes it better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Item {
    fn new(topic: &'static str, verdict: Verdict, found: impl Into<String>) -> Item {
        Item { topic, subject: String::new(), verdict, found: found.into(), mend: None }
    }

    fn fine(topic: &'static str, found: impl Into<String>) -> Item {
        Item::new(topic, Verdict::Fine, found)
    }

    fn wrong(topic: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Item {
        Item::new(topic, Verdict::Wrong, found).mend(mend)
    }

    fn not_here(topic: &'static str, found: impl Into<String>) -> Item {
        Item::new(topic, Verdict::NotHere, found)
    }

    fn of(mut self, subject: impl Into<String>) -> Item {
        self.subject = subject.into();
        self
    }

    fn mend(mut self, mend: impl Into<String>) -> Item {
        self.mend = Some(mend.into());
        self
    }
}

/// Looks at the machine whose /proc and /sys are in `tree`. What only the kernel itself can answer is asked of this machine's.
pub fn examine(tree: &Tree, topology: &Topology) -> Vec<Item> {
    let mut items = rdma::look(tree, topology);
    items.extend(gpu::look(tree, topology));
    items.push(gpu::ask(tree));
    items.extend(limits::look(tree));
    items.push(probe::io_uring(tree));
    items.push(probe::shared_memory());
    items
}
