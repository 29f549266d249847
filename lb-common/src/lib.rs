//! Every fact and rule that the kernel plane and the daemon share: record layouts, phases, checksums, reasons.
//!
//! No I/O and no allocation, so that it builds for the BPF target and for the host alike.
#![cfg_attr(not(test), no_std)]

pub mod access;
pub mod addr;
pub mod atomic;
pub mod bits;
pub mod checksum;
pub mod cookie;
pub mod event;
pub mod flow;
pub mod index;
pub mod layout;
pub mod member;
pub mod pair;
pub mod reason;
pub mod service;
pub mod shift;
pub mod stats;
pub mod tcp;
pub mod vlan;
