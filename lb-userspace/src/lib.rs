//! smtplb: the daemon and its command line.
//!
//! Rooms and who may call whom: `docs/architecture.md`.

pub mod admin;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod failure;
pub mod model;
pub mod monitor;
pub mod pool;
pub mod proxy;
pub mod smtp;
pub mod telemetry;
pub mod tls;
