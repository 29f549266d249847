//! A link that loses and reorders frames, by chance that a seed decides.
//!
//! ```text
//! box ─ br1 ─ tap ─┐        ┌─ tap ─ br0 ─ the switch's other ports
//!                  └ thread ┘
//! ```
//!
//! Built into a switch between the box and everybody else. The taps offer no offload, so the kernel cuts segments to the
//! MTU and finishes their checksums before they come here: what is lost is a packet, as on a wire.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    ioctl::{Opcode, Setter, ioctl},
};

use super::namespace::Namespace;
use crate::mail::Random;

/// How bad a link is, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Lost frames, percent.
    pub loss: u64,
    /// Frames that others overtake, percent.
    pub disorder: u64,
    /// The longest time that others have for it.
    pub delay: Duration,
    /// What chance starts from.
    pub seed: u64,
}

/// What a hop has done so far.
#[derive(Debug, Default)]
struct Counts {
    passed: AtomicU64,
    lost: AtomicU64,
    overtaken: AtomicU64,
}

/// The link; as it was again when dropped, save that nobody plugs the cable back in.
#[derive(Debug)]
pub struct Hop {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Hop {
    /// Puts the link into a switch, between its port `box` and the others.
    ///
    /// # Errors
    /// When the kernel has no taps.
    pub(super) fn insert(switch: &Namespace, weather: Weather) -> Result<Self> {
        let taps = switch.enter(|| Ok([tap("hop0")?, tap("hop1")?]))?;
        switch.ip(&[
            "link add br1 type bridge stp_state 0 forward_delay 0 mcast_snooping 0".to_owned(),
            "link set box master br1".to_owned(),
            "link set hop0 master br1".to_owned(),
            "link set hop1 master br0".to_owned(),
            "link set br1 up".to_owned(),
            "link set hop0 up".to_owned(),
            "link set hop1 up".to_owned(),
        ])?;
        let (stop, counts) = (Arc::<AtomicBool>::default(), Arc::<Counts>::default());
        let thread = {
            let (stop, counts) = (stop.clone(), counts.clone());
            std::thread::spawn(move || carry(&taps, weather, &stop, &counts))
        };
        Ok(Self {
            stop,
            counts,
            thread: Some(thread),
        })
    }

    /// Frames that were lost and frames that others overtook, of how many.
    pub fn toll(&self) -> (u64, u64, u64) {
        let [passed, lost, overtaken] = [
            &self.counts.passed,
            &self.counts.lost,
            &self.counts.overtaken,
        ]
        .map(|count| count.load(Relaxed));
        (lost, overtaken, passed + lost)
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// struct ifreq of linux/if.h, as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// `_IOW('T', 202, int)`, linux/if_tun.h.
const TUNSETIFF: Opcode = 0x4004_54ca;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;

fn tap(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    #[expect(unsafe_code, reason = "a system call that names the tap")]
    // SAFETY: the request has the kernel's shape.
    unsafe {
        ioctl(&file, Setter::<TUNSETIFF, Request>::new(request)).context("cannot make a tap")?;
    }
    Ok(file)
}

fn carry(taps: &[File; 2], weather: Weather, stop: &AtomicBool, counts: &Counts) {
    let mut random = Random::new(weather.seed);
    let mut late: BTreeMap<(Instant, u64), (usize, Vec<u8>)> = BTreeMap::new();
    let mut number = 0;
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Relaxed) {
        let now = Instant::now();
        while let Some(entry) = late.first_entry()
            && entry.key().0 <= now
        {
            let (side, frame) = entry.remove();
            let _ = (&taps[side]).write(&frame);
        }
        let wait = late
            .first_key_value()
            .map_or(Duration::from_millis(50), |((at, _), _)| *at - now);
        let mut ready = taps
            .each_ref()
            .map(|tap| PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN));
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        if poll(&mut ready, Some(&wait)).is_err() {
            continue;
        }
        for side in 0..2 {
            // A few at a time, so that neither direction starves the other.
            for _ in 0..32 {
                let length = match (&taps[side]).read(&mut buffer) {
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                let frame = &buffer[..length];
                // Who cannot find his neighbour tests nothing.
                let mail =
                    frame.get(12..14).is_some_and(|kind| kind != [0x08, 0x06]) && !is_icmp6(frame);
                if mail && random.next() % 100 < weather.loss {
                    counts.lost.fetch_add(1, Relaxed);
                    continue;
                }
                counts.passed.fetch_add(1, Relaxed);
                if mail && random.next() % 100 < weather.disorder {
                    counts.overtaken.fetch_add(1, Relaxed);
                    number += 1;
                    let delay = weather
                        .delay
                        .mul_f64((random.next() % 1000) as f64 / 1000.0);
                    late.insert((Instant::now() + delay, number), (side ^ 1, frame.to_vec()));
                    continue;
                }
                let _ = (&taps[side ^ 1]).write(frame);
            }
        }
    }
}

/// Neighbour discovery, mostly.
fn is_icmp6(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(20) == Some(&58)
}
