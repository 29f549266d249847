//! Workers over loopback, scripted members, real TLS clients.

mod dialogue;
mod hostile;
mod listeners;
mod members;
mod peers;
mod switch;
