//! The contract of `Transport`, written once and run on every fabric.
//!
//! Invariant: `contract.rs` knows no fabric; a fabric's file knows how to make its ends, and tests what is its own beside it.

#[macro_use]
mod contract;
mod fabrics;
mod lives;
mod shm;
mod shm_hostile;
mod shm_processes;
mod shm_users;
mod sim;
mod soft;
mod tcp;
mod verbs;
mod verbs_rails;
mod verbs_signalling;
mod world;
