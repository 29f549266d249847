//! The lab: clients, the box and members as network namespaces of one machine, with real mail between them.
//!
//! [`lab`] builds the machines and wires, [`daemon`] runs smtplb in the box, [`member`] runs a [`sink`],
//! a [`postfix`] or [another server](unpacked) on each member, [`client`] and
//! [`program`] send, [`verify`] compares what was sent with what arrived, [`bench`] measures.

pub mod bench;
pub mod certs;
pub mod client;
pub mod crowd;
pub mod daemon;
pub mod demo;
pub mod echo;
pub mod flood;
pub mod fuzz;
pub mod haproxy;
pub mod lab;
pub mod mail;
pub mod mailbox;
pub mod member;
pub mod postfix;
pub mod process;
pub mod program;
pub mod sink;
pub mod soak;
pub mod twin;
pub mod unpacked;
pub mod verify;
pub mod wait;
pub mod wire;
