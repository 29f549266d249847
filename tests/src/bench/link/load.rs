//! What is carried: short connections and long streams, between threads in the namespaces of a lab.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::Timeout;

use crate::{lab::Namespace, wait::pause};

/// Longer than anything takes here; a hang is a failure, and this ends it.
const PATIENCE: Duration = Duration::from_secs(10);
const BLOCK: usize = 256 * 1024;
/// Threads that accept, per member.
const ACCEPTORS: usize = 4;

/// Which way a stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the client to the member.
    Up,
    /// From the member to the client.
    Down,
}

/// Answers on a port until dropped.
#[derive(Debug)]
pub(super) struct Server {
    stop: Arc<AtomicBool>,
    address: SocketAddr,
    namespace: String,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// # Errors
    /// When the port is taken.
    pub(super) fn start(namespace: &Namespace, address: Ipv4Addr, port: u16) -> Result<Self> {
        let address = SocketAddr::new(address.into(), port);
        let stop = Arc::new(AtomicBool::new(false));
        let threads = namespace.enter(|| {
            let listener = TcpListener::bind(address).context("cannot listen")?;
            // Also how long an acceptor may take to hear that it is over.
            let pause = Some(Duration::from_millis(100));
            rustix::net::sockopt::set_socket_timeout(&listener, Timeout::Recv, pause)?;
            (0..ACCEPTORS)
                .map(|_| {
                    let (listener, stop) = (listener.try_clone()?, stop.clone());
                    Ok(thread::spawn(move || accept(&listener, &stop)))
                })
                .collect::<Result<_>>()
        })?;
        Ok(Self {
            stop,
            address,
            namespace: namespace.name().to_owned(),
            threads,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("bench: {} on {} panicked", self.address, self.namespace);
            }
        }
    }
}

fn accept(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        if let Ok((tcp, _)) = listener.accept() {
            // A client that goes away is how most of these end.
            let _ = answer(tcp, stop);
        }
    }
}

/// A greeting, then what the client asks for.
fn answer(mut tcp: TcpStream, stop: &AtomicBool) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))?;
    tcp.write_all(b"220 bench\r\n")?;
    let mut word = [0; 6];
    tcp.read_exact(&mut word)?;
    match &word {
        b"DOWN\r\n" => {
            let block = vec![0x5a; BLOCK];
            while !stop.load(Relaxed) {
                tcp.write_all(&block)?;
            }
        }
        b"UPUP\r\n" => {
            let mut block = vec![0; BLOCK];
            while tcp.read(&mut block)? > 0 && !stop.load(Relaxed) {}
        }
        _ => {
            tcp.write_all(b"221 bye\r\n")?;
            // Until the client has gone: nothing of ours stays in TIME_WAIT.
            while tcp.read(&mut word)? > 0 {}
        }
    }
    Ok(())
}

/// Opens a connection and reads the greeting.
fn open(server: SocketAddr) -> Result<BufReader<TcpStream>> {
    let tcp = TcpStream::connect_timeout(&server, PATIENCE)?;
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))?;
    // Closing by reset leaves no port behind in TIME_WAIT, of which a storm would run out.
    rustix::net::sockopt::set_socket_linger(&tcp, Some(Duration::ZERO))?;
    let mut input = BufReader::with_capacity(BLOCK, tcp);
    let mut line = String::new();
    input.read_line(&mut line)?;
    ensure!(line.starts_with("220"), "greeted by {line:?}");
    Ok(input)
}

/// Connections with greeting, command and reply, one after the other in each thread: how many, and the seconds that all
/// processors were busy, both per second.
///
/// # Errors
/// When one of them fails.
pub(super) fn connections(
    namespace: &Namespace,
    server: SocketAddr,
    threads: usize,
    time: Duration,
) -> Result<(f64, f64)> {
    namespace.enter(|| {
        let (begin, busy) = (Instant::now(), busy_seconds()?);
        let counts = thread::scope(|scope| {
            let running: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let mut count = 0u64;
                        while begin.elapsed() < time {
                            let mut input = open(server)?;
                            input.get_mut().write_all(b"QUIT\r\n")?;
                            let mut line = String::new();
                            input.read_line(&mut line)?;
                            ensure!(line.starts_with("221"), "answered by {line:?}");
                            count += 1;
                        }
                        Ok(count)
                    })
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<u64>>| match thread.join() {
                Ok(count) => count,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            running.into_iter().map(join).collect::<Result<Vec<u64>>>()
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        let busy = busy_seconds()? - busy;
        Ok((counts.iter().sum::<u64>() as f64 / seconds, busy / seconds))
    })
}

/// Streams side by side: bytes, and the seconds that all processors were busy, both per second; the first moments are
/// left aside.
///
/// # Errors
/// When one does not open or breaks.
pub(super) fn stream(
    namespace: &Namespace,
    server: SocketAddr,
    way: Way,
    flows: usize,
    time: Duration,
) -> Result<(f64, f64)> {
    let (bytes, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    namespace.enter(|| {
        let open: Vec<_> = (0..flows).map(|_| open(server)).collect::<Result<_>>()?;
        thread::scope(|scope| {
            let running: Vec<_> = open
                .into_iter()
                .map(|input| scope.spawn(|| carry(input, way, &bytes, &stop)))
                .collect();
            // TCP has to find its pace.
            pause(Duration::from_millis(300));
            let (begin, carried, busy) = (Instant::now(), bytes.load(Relaxed), busy_seconds()?);
            pause(time);
            let seconds = begin.elapsed().as_secs_f64();
            let carried = bytes.load(Relaxed) - carried;
            let busy = busy_seconds()? - busy;
            stop.store(true, Relaxed);
            for thread in running {
                match thread.join() {
                    Ok(outcome) => outcome?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok((carried as f64 / seconds, busy / seconds))
        })
    })
}

fn carry(
    mut input: BufReader<TcpStream>,
    way: Way,
    bytes: &AtomicU64,
    stop: &AtomicBool,
) -> Result<()> {
    let mut block = vec![0x5a; BLOCK];
    let word = match way {
        Way::Up => b"UPUP\r\n",
        Way::Down => b"DOWN\r\n",
    };
    input.get_mut().write_all(word)?;
    while !stop.load(Relaxed) {
        let count = match way {
            Way::Up => input.get_mut().write(&block)?,
            Way::Down => input.read(&mut block)?,
        };
        ensure!(count > 0, "the member has closed the stream");
        bytes.fetch_add(count as u64, Relaxed);
    }
    Ok(())
}

/// Seconds that the processors were busy since the start, interrupts included, time stolen by a host not.
///
/// # Errors
/// When the kernel does not tell.
pub(super) fn busy_seconds() -> Result<f64> {
    /// Of `/proc/stat`, on every architecture that matters.
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    ensure!(fields.len() > 6, "/proc/stat begins with {line:?}");
    // user, nice, system, (idle, iowait,) irq, softirq
    Ok((fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / TICKS)
}
