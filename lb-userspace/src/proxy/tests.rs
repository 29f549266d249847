//! Workers over loopback, scripted members, real TLS clients.

mod dialogue;
mod entry;
mod hostile;
mod peers;
mod pressure;
