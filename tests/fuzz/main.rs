//! Hostile bytes for every parser that meets them; see `tests/src/fuzz.rs`.

mod cuts;
mod proxy_header;
mod shell;
mod smtp_client;
mod smtp_server;
