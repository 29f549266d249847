//! What the daemon says about what it did.

pub mod flow;
pub mod session;
