//! A flood of first packets from clients that do not exist, as fast as the machine sends them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use crate::{
    bench::replay::OBJECT,
    daemon::Daemon,
    echo::Traffic,
    lab::{Family, Lab, Links, Namespace, Plan, VIRTUAL},
    soak::{self, Held},
    wait::pause,
};

/// Packets of one run of the generator; between two it looks whether it shall stop.
const RUN: u32 = 100_000;
/// Packets that the kernel sends at once; the most it takes is 256.
const BATCH: u32 = 64;

/// Sends until dropped.
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Flood {
    /// Sends to a server by a port of a namespace, to the machine with this MAC address behind it.
    ///
    /// # Errors
    /// When the kernel refuses the generator (Linux 5.18).
    pub fn start(
        namespace: &Namespace,
        port: &str,
        machine: [u8; 6],
        server: (Ipv4Addr, u16),
    ) -> Result<Self> {
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let mut flood = Self {
            stop: stop.clone(),
            sent: sent.clone(),
            thread: None,
        };
        let packet = first_packet(machine, server);
        flood.thread = Some(namespace.enter(|| {
            let mut ebpf = Ebpf::load(OBJECT).context("cannot load the generator")?;
            let program: &mut Xdp = ebpf
                .program_mut("flood")
                .context("no generator")?
                .try_into()?;
            program.load()?;
            let index = name_to_index(socket(AddressFamily::INET, SocketType::DGRAM, None)?, port)?;
            let map = ebpf.take_map("FLOOD").context("no map")?;
            let mut state: Array<MapData, [u32; 18]> = map.try_into()?;
            let mut record = [0; 18];
            record[0] = index;
            for (word, bytes) in record[2..].iter_mut().zip(packet.as_chunks::<4>().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            state.set(0, record, 0)?;
            Ok(thread::spawn(move || {
                generate(&mut ebpf, &packet, &stop, &sent)
            }))
        })?);
        Ok(flood)
    }

    /// Packets so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Ends it; how many packets there were.
    ///
    /// # Errors
    /// When it had ended by itself.
    pub fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome?,
            _ => bail!("the generator panicked"),
        }
        Ok(self.sent.load(Relaxed))
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn generate(ebpf: &mut Ebpf, packet: &[u8], stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let program: &mut Xdp = ebpf
        .program_mut("flood")
        .context("no generator")?
        .try_into()?;
    while !stop.load(Relaxed) {
        let options = TestRunOptions {
            data_in: Some(packet),
            repeat: RUN,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        program.test_run(options).context("the generator ended")?;
        sent.fetch_add(u64::from(RUN), Relaxed);
    }
    Ok(())
}

/// A SYN with complete checksums, which the generator keeps right.
fn first_packet(machine: [u8; 6], (address, port): (Ipv4Addr, u16)) -> Vec<u8> {
    let source = Ipv4Addr::new(198, 18, 0, 1);
    let mut tcp = Vec::new();
    tcp.extend(1024u16.to_be_bytes());
    tcp.extend(port.to_be_bytes());
    tcp.extend(0x1234_5678u32.to_be_bytes());
    tcp.extend([0; 4]);
    // Four more bytes of header: the segment size, as everybody sends it.
    tcp.extend([0x60, 0x02, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0x05, 0xb4]);
    let length = tcp.len() as u16;
    let mut pseudo = [source.octets(), address.octets()].concat();
    pseudo.extend([0, 6]);
    pseudo.extend(length.to_be_bytes());
    let check = sum(&[pseudo, tcp.clone()].concat());
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend((20 + length).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    ip.extend(source.octets());
    ip.extend(address.octets());
    let check = sum(&ip);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let ethernet = [&machine[..], &[2, 0, 0, 0, 0, 9, 0x08, 0]].concat();
    let mut packet = [ethernet, ip, tcp].concat();
    packet.resize(64, 0);
    packet
}

/// The internet checksum (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// How hard.
#[derive(Debug, Clone, Copy)]
pub struct Flooding {
    /// For how long.
    pub time: Duration,
    /// Idle flows that have to outlive it.
    pub idle: usize,
    /// New connections in a second, of clients that exist.
    pub rate: u32,
    /// Whether each of these has to get in.
    pub newcomers: bool,
    /// Ports towards each member, where the box does not use all.
    pub ports: Option<&'static str>,
}

impl Flooding {
    /// For the normal suite.
    pub const SHORT: Self = Self {
        time: Duration::from_secs(5),
        idle: 300,
        rate: 20,
        newcomers: true,
        ports: None,
    };
    /// The same, with fewer ports than half-open connections may otherwise have.
    pub const FEW_PORTS: Self = Self {
        ports: Some("10000-11999"),
        ..Self::SHORT
    };
    /// What is promised.
    pub const MINUTE: Self = Self {
        time: Duration::from_mins(1),
        idle: 10_000,
        rate: 20,
        newcomers: true,
        ports: None,
    };
}

/// Floods a virtual server: no idle flow may be lost, and clients that exist must get in.
///
/// # Errors
/// Says how many were lost, how, and what the kernel plane refused.
pub fn endure(flooding: Flooding, attach: &str) -> Result<()> {
    let links = match attach {
        "tc" => Links::Plain,
        _ => Links::ForXdp,
    };
    let plan = Plan {
        links,
        ..Plan::TWO_ARM
    };
    Lab::run(plan, |lab| {
        // A virtual link takes frames that a program sends only when its far end polls, as it does with GRO.
        let mut ethtool = Command::new("ethtool");
        lab.balancer
            .run(ethtool.args(["-K", lab.interfaces().0, "gro", "on"]))?;
        let _members = soak::members(lab)?;
        let mut config = soak::config(lab, attach).text().to_owned();
        if let Some(ports) = flooding.ports {
            let line = format!("[network]\nsnat_ports = \"{ports}\"\n");
            config = config.replacen("[network]\n", &line, 1);
        }
        let daemon = Daemon::start(lab, &config)?;
        let mut held = Held::open(lab, flooding.idle)?;
        let before = carried(&daemon)?;
        let switch = lab.client_switch().context("no switch")?;
        let server = (VIRTUAL.0, 465);
        let flood = Flood::start(switch, "box", mac(lab)?, server)?;
        let began = Instant::now();
        let clients = [SocketAddr::new(Family::V4.virtual_address(), 465)];
        let traffic = Traffic::start(&lab.clients[0].namespace, &clients, flooding.rate)?;
        pause(flooding.time);
        let during = traffic.stop();
        let seconds = began.elapsed().as_secs_f64();
        let sent = flood.stop()?;
        let arrived = carried(&daemon)? - before;
        let lost = held.use_each();
        let drops = daemon.stats()?.drops;
        println!(
            "{attach}: {sent} first packets in {seconds:.0} s ({:.0}/s), {arrived} seen by the virtual server; \
             {} of {} idle flows lost; {} new connections in, {} not; refused: {drops:?}",
            sent as f64 / seconds,
            lost.len(),
            flooding.idle,
            during.done,
            during.failed.len(),
        );
        let refused = flooding.newcomers && !during.failed.is_empty();
        if !lost.is_empty() || refused || during.done == 0 || arrived == 0 {
            bail!(
                "under {sent} first packets ({arrived} seen): {} of {} idle flows lost {:?}; {} new connections in, \
                 these not: {:?}; refused: {drops:?}",
                lost.len(),
                flooding.idle,
                lost.iter().take(5).collect::<Vec<_>>(),
                during.done,
                during.failed
            );
        }
        Ok(())
    })
}

/// Packets from clients that the virtual servers have counted, and what was refused.
fn carried(daemon: &Daemon<'_>) -> Result<u64> {
    let stats = daemon.stats()?;
    let carried = stats
        .virtual_servers
        .values()
        .map(|traffic| traffic.packets_in);
    Ok(carried.sum::<u64>() + stats.drops.values().sum::<u64>())
}

/// Of the box, towards the clients.
fn mac(lab: &Lab) -> Result<[u8; 6]> {
    let mut ip = Command::new("ip");
    let said = lab
        .balancer
        .run(ip.args(["-oneline", "link", "show", lab.interfaces().0]))?;
    let text = said
        .split("link/ether ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .context("no MAC address")?;
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(text.split(':')) {
        *to = u8::from_str_radix(from, 16)?;
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complete_checksum_sums_to_nothing() {
        let packet = first_packet([2; 6], (VIRTUAL.0, 465));
        assert_eq!(sum(&packet[14..34]), 0);
    }
}
