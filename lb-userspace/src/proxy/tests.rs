//! Workers over loopback, scripted members, real TLS clients.

mod dialogue;
mod hostile;
mod members;
mod peers;
