//! SMTP without sockets or clocks: lines, commands, replies, capabilities, and the session between a client and a member.

pub mod reply;
