//! SMTP without sockets or clocks: lines, commands, replies, capabilities, and the session between a client and a member.

pub mod body;
pub mod capability;
pub mod command;
pub mod line;
pub mod reply;
pub mod timeouts;
