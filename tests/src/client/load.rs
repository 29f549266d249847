//! Many connections at once: held open, or opened without pause.

use std::{
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use super::{Options, Session};
use crate::lab::Namespace;

/// Connections that stay open.
pub struct Held {
    sessions: Vec<Session>,
}

impl Held {
    /// Opens `count` connections, each past EHLO and TLS.
    ///
    /// # Errors
    /// When one does not come that far.
    pub fn open(options: &Options, count: usize) -> Result<Self> {
        let tls = match &options.ca {
            Some(ca) => Some(crate::wire::client_config(ca)?),
            None => None,
        };
        let sessions = (0..count)
            .map(|number| {
                Session::open(options, tls.as_ref()).with_context(|| format!("connection {number}"))
            })
            .collect::<Result<_>>()?;
        Ok(Self { sessions })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Asks each for a sign of life; what the broken ones said.
    pub fn broken(&mut self) -> Vec<String> {
        self.sessions
            .iter_mut()
            .filter_map(|session| session.noop().err().map(|refusal| refusal.to_string()))
            .collect()
    }

    /// Sends one message over each; what went wrong.
    pub fn send_over_each(&mut self, text: &[u8]) -> Vec<String> {
        self.sessions
            .iter_mut()
            .filter_map(|session| {
                session
                    .send(text, true)
                    .err()
                    .map(|refusal| refusal.to_string())
            })
            .collect()
    }

    /// Says goodbye on each.
    pub fn close(self) {
        self.sessions.into_iter().for_each(Session::quit);
    }
}

/// Threads that connect as fast as they can until they are told to stop.
pub struct Storm {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

/// What a storm came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StormReport {
    /// Connections that opened.
    pub opened: u64,
    /// What the others got.
    pub failed: Vec<String>,
}

impl Storm {
    /// Lets `threads` threads in `namespace` loose on `server`.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn start(namespace: &Namespace, server: SocketAddr, threads: usize) -> Result<Self> {
        let mut storm = Self {
            stop: Arc::default(),
            done: Arc::default(),
            failed: Arc::default(),
            threads: Vec::new(),
        };
        storm.threads = namespace.enter(|| {
            Ok((0..threads)
                .map(|_| {
                    let (stop, done, failed) =
                        (storm.stop.clone(), storm.done.clone(), storm.failed.clone());
                    thread::spawn(move || rage(server, &stop, &done, &failed))
                })
                .collect())
        })?;
        Ok(storm)
    }

    /// Connections that opened so far.
    pub fn opened(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Ends it.
    pub fn stop(self) -> StormReport {
        self.stop.store(true, Relaxed);
        for thread in self.threads {
            let _ = thread.join();
        }
        StormReport {
            opened: self.done.load(Relaxed),
            failed: std::mem::take(
                &mut *self.failed.lock().unwrap_or_else(PoisonError::into_inner),
            ),
        }
    }
}

fn rage(server: SocketAddr, stop: &AtomicBool, done: &AtomicU64, failed: &Mutex<Vec<String>>) {
    // Long enough for two SYNs more, so that a lost packet is not taken for a refusal.
    const PATIENCE: Duration = Duration::from_secs(10);
    while !stop.load(Relaxed) {
        match TcpStream::connect_timeout(&server, PATIENCE) {
            Ok(tcp) => {
                done.fetch_add(1, Relaxed);
                // Closing by reset leaves no port behind in TIME_WAIT, of which a storm would run out.
                let _ = rustix::net::sockopt::set_socket_linger(&tcp, Some(Duration::ZERO));
            }
            Err(error) => failed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(error.to_string()),
        }
    }
}
