//! Members that send back what they get, and clients that compare every byte.
//!
//! Below SMTP on purpose: thousands of connections a second, and streams as fast as the links carry them.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    net::sockopt::set_socket_linger,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use crate::{
    lab::{Family, Host, Lab, Namespace},
    process::{self, Process},
    wait::{patience, pause},
};

/// Longer than three lost packets in a row take; a hang is a failure, and this ends it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that payloads are cut out of.
const PATTERN: usize = 1 << 20;

/// Sends back what it gets, on both addresses of a host, until dropped.
#[derive(Debug)]
pub struct Echo {
    _process: Process,
}

impl Echo {
    /// A process of its own: open files are counted per process.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(lab: &Lab, host: &Host, port: u16) -> Result<Self> {
        let mut command = Command::new(process::own_program("smtplb-echo")?);
        for family in Family::ALL {
            command.arg(SocketAddr::new(host.address(family), port).to_string());
        }
        let log = lab.folder().join(format!("{}-echo.log", host.name));
        let mut process = Process::spawn(&host.namespace, "smtplb-echo", &log, &mut command)?;
        process.wait_for_line(Duration::from_secs(10), 0, "listening")?;
        Ok(Self { _process: process })
    }
}

/// The program: sends back what it gets.
///
/// # Errors
/// When it cannot listen.
pub fn serve(addresses: &[SocketAddr]) -> Result<()> {
    raise_open_files()?;
    let listeners = addresses
        .iter()
        .map(|address| {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("cannot listen on {address}"))?;
            // A storm's worth of connections that wait for their thread.
            rustix::net::listen(&listener, 65_535)?;
            Ok(listener)
        })
        .collect::<Result<Vec<_>>>()?;
    println!("listening");
    thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                for tcp in listener.incoming().flatten() {
                    // Clients judge; one that goes away is no news here. Idle ones are many, so their threads are small.
                    let small = thread::Builder::new().stack_size(128 * 1024);
                    let peer = tcp.peer_addr().ok();
                    let spawned = small.spawn(move || {
                        if let Err(error) = answer(tcp) {
                            eprintln!("{peer:?}: {error}");
                        }
                    });
                    // Its client sees a reset, and is to know whose it was.
                    if let Err(error) = spawned {
                        eprintln!("{peer:?}: no thread: {error}");
                    }
                }
            });
        }
    });
    Ok(())
}

/// Lets this process open as many files as it may.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_open_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, all).context("cannot raise the limit of open files")
}

fn answer(mut tcp: TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(Duration::from_hours(1)))?;
    tcp.set_write_timeout(Some(PATIENCE * patience()))?;
    let mut block = vec![0; 32 * 1024];
    loop {
        match tcp.read(&mut block)? {
            0 => return tcp.shutdown(Shutdown::Write),
            count => tcp.write_all(&block[..count])?,
        }
    }
}

/// Bytes that look like nothing in particular, always the same.
#[derive(Debug)]
pub struct Pattern(Vec<u8>);

impl Default for Pattern {
    fn default() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = (0..PATTERN / 8).flat_map(|_| {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_ne_bytes()
        });
        Self(words.collect())
    }
}

impl Pattern {
    /// The bytes of a stream at a place, at most `length`.
    fn at(&self, place: usize, length: usize) -> &[u8] {
        let from = place % PATTERN;
        &self.0[from..PATTERN.min(from + length)]
    }
}

/// A connection, and how many bytes it has sent and got back.
#[derive(Debug)]
pub struct Exchange {
    tcp: TcpStream,
    /// Where in the pattern it began.
    from: usize,
    sent: usize,
}

impl Exchange {
    /// # Errors
    /// When the connection does not open.
    pub fn open(server: SocketAddr, from: usize) -> Result<Self> {
        let limit = PATIENCE * patience();
        let tcp = TcpStream::connect_timeout(&server, limit).context("connect")?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(limit))?;
        tcp.set_write_timeout(Some(limit))?;
        Ok(Self { tcp, from, sent: 0 })
    }

    /// Sends bytes and compares what comes back.
    ///
    /// # Errors
    /// Says what was different, or what broke.
    pub fn carry(&mut self, pattern: &Pattern, length: usize) -> Result<()> {
        let begin = self.from + self.sent;
        let mut output = self.tcp.try_clone()?;
        // As long as it fits into buffers, nobody has to read meanwhile.
        if length <= 32 * 1024 {
            send(&mut output, pattern, begin, length)?;
            receive(&mut self.tcp, pattern, begin, length)?;
        } else {
            thread::scope(|scope| {
                let sending = scope.spawn(|| send(&mut output, pattern, begin, length));
                let received = receive(&mut self.tcp, pattern, begin, length);
                match sending.join() {
                    Ok(sent) => received.and(sent),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            })?;
        }
        self.sent += length;
        Ok(())
    }

    /// Closes in order: both sides have heard everything.
    ///
    /// # Errors
    /// When the other side does not close in order.
    pub fn close(mut self) -> Result<()> {
        self.tcp.shutdown(Shutdown::Write).context("close")?;
        let rest = self.tcp.read(&mut [0; 1]).context("close")?;
        ensure!(rest == 0, "bytes behind the end");
        Ok(())
    }

    /// Closes by reset.
    ///
    /// # Errors
    /// When the socket does not take the option.
    pub fn reset(self) -> Result<()> {
        set_socket_linger(&self.tcp, Some(Duration::ZERO))?;
        Ok(())
    }
}

fn send(output: &mut TcpStream, pattern: &Pattern, begin: usize, length: usize) -> Result<()> {
    let mut done = 0;
    while done < length {
        let bytes = pattern.at(begin + done, length - done);
        output
            .write_all(bytes)
            .with_context(|| format!("write at byte {done}"))?;
        done += bytes.len();
    }
    Ok(())
}

fn receive(input: &mut TcpStream, pattern: &Pattern, begin: usize, length: usize) -> Result<()> {
    let mut block = vec![0; length.min(256 * 1024)];
    let mut done = 0;
    while done < length {
        let wanted = pattern.at(begin + done, (length - done).min(block.len()));
        let got = &mut block[..wanted.len()];
        input
            .read_exact(got)
            .with_context(|| format!("read at byte {done}"))?;
        if got != wanted {
            let at = got
                .iter()
                .zip(wanted)
                .position(|(got, wanted)| got != wanted);
            bail!("corrupted at byte {}", done + at.unwrap_or_default());
        }
        done += wanted.len();
    }
    Ok(())
}

/// New connections at a rate, each with payload both ways, until told to stop.
pub struct Traffic {
    shared: Arc<Shared>,
    began: Instant,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    bytes: AtomicU64,
    failed: Mutex<Vec<String>>,
}

/// What a [`Traffic`] came to.
#[derive(Debug, Clone)]
pub struct TrafficReport {
    /// Connections that opened, carried and closed as they should.
    pub done: u64,
    /// Bytes there and back again.
    pub bytes: u64,
    /// Connections in a second.
    pub rate: f64,
    /// What the others met, the first of them.
    pub failed: Vec<String>,
}

/// Failures that are worth keeping.
const KEPT: usize = 50;
/// Threads that share a rate.
const THREADS: u32 = 8;

impl Traffic {
    /// # Errors
    /// When the namespace cannot be entered, or refuses a setting.
    pub fn start(namespace: &Namespace, servers: &[SocketAddr], per_second: u32) -> Result<Self> {
        // A client that opens thousands of connections to one server needs its ports back soon.
        namespace.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        namespace.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        let shared = Arc::new(Shared::default());
        let pattern = Arc::new(Pattern::default());
        let threads = namespace.enter(|| {
            let start = |number: u32| {
                let (shared, pattern) = (shared.clone(), pattern.clone());
                let servers = servers.to_vec();
                let beat = Duration::from_secs(1) * THREADS / per_second.max(1);
                thread::spawn(move || drive(number as usize, beat, &servers, &pattern, &shared))
            };
            Ok((0..THREADS).map(start).collect())
        })?;
        Ok(Self {
            shared,
            began: Instant::now(),
            threads,
        })
    }

    /// Connections so far.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Relaxed)
    }

    /// Whether none has failed so far.
    pub fn is_unharmed(&self) -> bool {
        self.shared.failures().is_empty()
    }

    /// Ends it.
    pub fn stop(self) -> TrafficReport {
        self.shared.stop.store(true, Relaxed);
        for thread in self.threads {
            let _ = thread.join();
        }
        let done = self.shared.done.load(Relaxed);
        TrafficReport {
            done,
            bytes: self.shared.bytes.load(Relaxed),
            rate: done as f64 / self.began.elapsed().as_secs_f64(),
            failed: self.shared.failures().clone(),
        }
    }
}

impl Shared {
    fn failures(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn drive(
    number: usize,
    beat: Duration,
    servers: &[SocketAddr],
    pattern: &Pattern,
    shared: &Shared,
) {
    let mut next = Instant::now();
    let mut turn = number;
    while !shared.stop.load(Relaxed) {
        pause(next.saturating_duration_since(Instant::now()));
        // What could not be kept up with is not made up for: a burst would be another test.
        next = (next + beat).max(Instant::now());
        turn += THREADS as usize;
        let server = servers[turn / THREADS as usize % servers.len()];
        // From nothing at all to a few segments, each connection with bytes of its own.
        let length = turn.wrapping_mul(2_654_435_761) % 12_000;
        let once = || -> Result<()> {
            let mut exchange = Exchange::open(server, turn.wrapping_mul(7919) % PATTERN)?;
            exchange.carry(pattern, length / 2)?;
            exchange.carry(pattern, length - length / 2)?;
            exchange.close()
        };
        match once() {
            Ok(()) => {
                shared.done.fetch_add(1, Relaxed);
                shared.bytes.fetch_add(2 * length as u64, Relaxed);
            }
            Err(error) => {
                let mut failures = shared.failures();
                if failures.len() < KEPT {
                    failures.push(format!("{server}, {length} bytes: {error:#}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_goes_round_the_pattern() {
        let pattern = Pattern::default();
        assert_eq!(pattern.at(PATTERN - 3, 10).len(), 3);
        assert_eq!(pattern.at(2 * PATTERN + 5, 10), pattern.at(5, 10));
        assert_ne!(pattern.at(0, 8), pattern.at(8, 8));
    }
}
