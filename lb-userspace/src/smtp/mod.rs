//! SMTP without sockets or clocks: lines, commands, replies, capabilities, and the session between a client and a member.

pub mod approach;
pub mod body;
pub mod capability;
pub mod command;
pub mod end;
pub mod line;
mod mend;
pub mod phase;
pub mod reply;
pub mod session;
pub mod timeouts;
