//! Workers over loopback, scripted members, real TLS clients.

mod announced;
mod dialogue;
mod entry;
mod hostile;
mod listeners;
mod members;
mod peers;
mod pressure;
mod scout;
mod splice;
mod switch;
mod tickets;
mod unsent;
mod waits;
