//! What the daemon says about what it did.

pub mod firewall;
pub mod flow;
pub mod lines;
pub mod session;
