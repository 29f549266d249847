//! What the daemon says about what it did.

pub mod firewall;
pub mod session;
