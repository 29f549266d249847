//! Where the packet programs are attached, and why there.

use std::{collections::BTreeSet, fs, io, path::Path, thread, time::Duration};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        tc::TcAttachOptions,
    },
};

use super::{bpffs::PinDirectory, clsact, jumps::Jumps, loader};
use crate::{
    admin::view::AttachmentView,
    model::{Attach, Network},
};

/// How often an interface that is taken is asked for, and how long after one another: half a second in all.
const ROOM_TRIES: u32 = 50;
const ROOM_BEAT: Duration = Duration::from_millis(10);

/// The hook of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hook {
    Tc,
    Xdp,
    XdpGeneric,
}

impl Hook {
    /// The hook that a program was written for, by the end of its name.
    pub(super) fn of(program: &str) -> Self {
        [Self::Tc, Self::Xdp, Self::XdpGeneric]
            .into_iter()
            .find(|hook| program.ends_with(hook.suffix()))
            .unwrap_or(Self::Tc)
    }

    /// How the names of its programs end.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::Tc => "tc",
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp_generic",
        }
    }

    /// The map of the programs that may be jumped to.
    pub(super) const fn jumps(self) -> &'static str {
        match self {
            Self::Tc => "TC_JUMPS",
            Self::Xdp => "XDP_JUMPS",
            Self::XdpGeneric => "XDP_GENERIC_JUMPS",
        }
    }
}

/// What [`attach`] has done: where, and under which pins.
pub(super) type Attached = (Vec<AttachmentView>, Vec<String>);

/// Attaches the programs to every interface of the configuration, or swaps them in place where an earlier daemon left
/// its links. Other links stay until [`detach_others`].
///
/// # Errors
///
/// When the kernel refuses a program or an attachment. What was attached stays pinned; the caller takes it down.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    jumps: &mut Jumps,
    network: &Network,
) -> Result<Attached> {
    let mut interfaces = network.client_interfaces.clone();
    for interface in &network.server_interfaces {
        if !interfaces.contains(interface) {
            interfaces.push(interface.clone());
        }
    }
    let mut choice = choose(network.attach, &interfaces);
    let (words, wanted) = match attach_all(ebpf, pins, jumps, &interfaces, choice.hook) {
        // A packet that XDP sends to an interface without XDP is lost unseen: so it is all or none.
        Err(error) if network.attach == Attach::Auto && choice.hook == Hook::Xdp => {
            log::info!("{error:#}");
            choice = Choice {
                hook: Hook::Tc,
                why: Why::NoDriver(format!("{}", error.root_cause())),
            };
            for interface in &interfaces {
                pins.unpin(&xdp_pin(Hook::Xdp, interface))?;
            }
            attach_all(ebpf, pins, jumps, &interfaces, choice.hook)?
        }
        attached => attached?,
    };
    let view = |(interface, word): (String, &str)| AttachmentView {
        why: choice.why(&interface),
        interface,
        hook: word.to_owned(),
    };
    let views = interfaces.into_iter().zip(words).map(view).collect();
    Ok((views, wanted))
}

/// The pins of links on interfaces.
pub(super) fn pinned(pins: &PinDirectory) -> BTreeSet<String> {
    let names = pins.names().into_iter();
    names
        .filter(|name| name.starts_with("link-") && name != STEERING)
        .collect()
}

/// Has the programs attached where they were `before` [`attach`], and nowhere else: what made room for another mode
/// comes back.
///
/// # Errors
///
/// When a pin cannot be removed, or the kernel refuses an attachment.
pub(super) fn restore(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    jumps: &mut Jumps,
    before: &BTreeSet<String>,
) -> Result<()> {
    for added in &pinned(pins) - before {
        pins.unpin(&added)?;
    }
    for gone in before - &pinned(pins) {
        for (hook, mode) in [
            (Hook::Xdp, XdpMode::Driver),
            (Hook::XdpGeneric, XdpMode::Skb),
        ] {
            let Some(interface) = gone.strip_prefix(&xdp_pin(hook, "")) else {
                continue;
            };
            jumps.ready(ebpf, hook)?;
            jumps.pin(pins)?;
            let program = loader::xdp(ebpf, &format!("balance_{}", hook.suffix()))?;
            pin_xdp(program, interface, mode, &pins.pin(&gone))
                .with_context(|| format!("cannot attach XDP to {interface} again"))?;
        }
    }
    Ok(())
}

/// Removes links that [`attach`] has not made or taken over.
///
/// # Errors
///
/// When a pin cannot be removed.
pub(super) fn detach_others(pins: &PinDirectory, wanted: &[String]) -> Result<()> {
    for name in pinned(pins) {
        if !wanted.contains(&name) {
            pins.unpin(&name)?;
        }
    }
    Ok(())
}

/// The hook, one for all interfaces, and what decided.
struct Choice {
    hook: Hook,
    why: Why,
}

/// What decided on a hook.
enum Why {
    Configured,
    /// The first interface that has no device of its own.
    Virtual(String),
    /// Every interface is a network card whose driver takes the program.
    Cards,
    /// What the kernel said of the first whose driver does not.
    NoDriver(String),
}

impl Choice {
    /// What a person should read about an interface.
    fn why(&self, interface: &str) -> String {
        match &self.why {
            _ if interface == LOOPBACK => "clients on this box".to_owned(),
            Why::Configured => "configured".to_owned(),
            Why::Virtual(_) if is_virtual(interface) => {
                "virtual link: TC keeps segmentation offload".to_owned()
            }
            Why::Virtual(other) => format!("as {other}, which is virtual: one hook for all"),
            Why::Cards => "NICs with XDP in their drivers".to_owned(),
            Why::NoDriver(cause) => format!("not every driver has XDP: {cause}"),
        }
    }
}

fn choose(attach: Attach, interfaces: &[String]) -> Choice {
    let mut outside = interfaces.iter().filter(|name| *name != LOOPBACK);
    let (hook, why) = match attach {
        Attach::Tc => (Hook::Tc, Why::Configured),
        Attach::Xdp => (Hook::Xdp, Why::Configured),
        Attach::XdpGeneric => (Hook::XdpGeneric, Why::Configured),
        Attach::Auto => match outside.find(|interface| is_virtual(interface)) {
            Some(name) => (Hook::Tc, Why::Virtual(name.clone())),
            None => (Hook::Xdp, Why::Cards),
        },
    };
    Choice { hook, why }
}

/// The interface that a box reaches itself by; XDP in the driver has no place there.
pub(super) const LOOPBACK: &str = "lo";

/// Attaches to every interface: the word for each, and the pins that are wanted.
fn attach_all(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    jumps: &mut Jumps,
    interfaces: &[String],
    hook: Hook,
) -> Result<(Vec<&'static str>, Vec<String>)> {
    // Behind XDP runs TC.
    jumps.ready(ebpf, Hook::Tc)?;
    jumps.ready(ebpf, hook)?;
    jumps.pin(pins)?;
    let (mut words, mut wanted) = (Vec::new(), Vec::new());
    for interface in interfaces {
        let word = attach_one(ebpf, pins, hook, interface, &mut wanted)
            .with_context(|| format!("cannot attach the packet programs to {interface}"))?;
        words.push(word);
    }
    Ok((words, wanted))
}

/// The pin of the steering program's link.
pub(super) const STEERING: &str = "link-steering";

fn attach_one(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    hook: Hook,
    interface: &str,
    wanted: &mut Vec<String>,
) -> Result<&'static str> {
    // Behind XDP, the TC program takes what XDP cannot finish: a neighbour that has to be asked for.
    let tc = attach_tc(ebpf, pins, interface, wanted)?;
    match hook {
        Hook::Tc => return Ok(tc),
        _ if interface == LOOPBACK => return Ok(tc),
        Hook::Xdp => attach_xdp(
            ebpf,
            pins,
            interface,
            [Hook::Xdp, Hook::XdpGeneric],
            XdpMode::Driver,
            wanted,
        )?,
        Hook::XdpGeneric => {
            attach_xdp(
                ebpf,
                pins,
                interface,
                [Hook::XdpGeneric, Hook::Xdp],
                XdpMode::Skb,
                wanted,
            )?;
            return Ok("xdp-generic");
        }
    }
    Ok("xdp")
}

fn attach_tc(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    interface: &str,
    names: &mut Vec<String>,
) -> Result<&'static str> {
    let program = loader::classifier(ebpf, "balance_tc")?;
    if !has_tcx() {
        clsact::attach(program, interface)?;
        return Ok("clsact");
    }
    let name = format!("link-tc-{interface}");
    let path = pins.pin(&name);
    names.push(name);
    if adopt_tc(program, &path).is_some() {
        return Ok("tcx");
    }
    let _ = fs::remove_file(&path);
    let id = program.attach_with_options(
        interface,
        TcAttachType::Ingress,
        TcAttachOptions::TcxOrder(LinkOrder::first()),
    )?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(&path)?;
    Ok("tcx")
}

/// Swaps the program of a pinned link; `None` when there is none, or its interface is gone.
fn adopt_tc(program: &mut SchedClassifier, path: &Path) -> Option<()> {
    let link = FdLink::from(PinnedLink::from_pin(path).ok()?);
    program.attach_to_link(link.try_into().ok()?).ok().map(drop)
}

/// Attaches the first of two programs; a link of the other, left from another mode, makes room for it.
fn attach_xdp(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    interface: &str,
    hooks: [Hook; 2],
    mode: XdpMode,
    wanted: &mut Vec<String>,
) -> Result<()> {
    let [name, other] = hooks.map(|hook| xdp_pin(hook, interface));
    let program = loader::xdp(ebpf, &format!("balance_{}", hooks[0].suffix()))?;
    let path = pins.pin(&name);
    if adopt_xdp(program, &path).is_none() {
        let _ = fs::remove_file(&path);
        pins.unpin(&other)?;
        // An interface has one XDP program: that of another layout makes room, its TC program behind ours carries on.
        for path in pins.others() {
            for name in [&name, &other] {
                let _ = fs::remove_file(path.join(name));
            }
        }
        pin_xdp(program, interface, mode, &path).context(
            "XDP cannot be attached there; `attach = \"auto\"` takes TC where the driver has no XDP, and \
             `attach = \"xdp-generic\"` works on any interface",
        )?;
    }
    wanted.push(name);
    Ok(())
}

/// The pin of an XDP program's link.
fn xdp_pin(hook: Hook, interface: &str) -> String {
    format!("link-balance_{}-{interface}", hook.suffix())
}

/// Attaches a program and pins its link. The kernel ends a link that was unpinned some moments later, and until then the
/// interface is taken.
#[expect(
    clippy::disallowed_methods,
    reason = "attaching is no async work, and hardly ever waits: where the mode changes, for a grace period of the kernel"
)]
fn pin_xdp(program: &mut Xdp, interface: &str, mode: XdpMode, path: &Path) -> Result<()> {
    let mut tries = 1..ROOM_TRIES;
    let id = loop {
        match program.attach(interface, mode) {
            Err(ProgramError::SyscallError(error))
                if is_taken(&error.io_error) && tries.next().is_some() =>
            {
                thread::sleep(ROOM_BEAT);
            }
            attached => break attached?,
        }
    };
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(path)?;
    Ok(())
}

/// By a program of the other mode, or of another link.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AlreadyExists | io::ErrorKind::ResourceBusy
    )
}

fn adopt_xdp(program: &mut Xdp, path: &Path) -> Option<()> {
    let link = FdLink::from(PinnedLink::from_pin(path).ok()?);
    program.attach_to_link(link.try_into().ok()?).ok().map(drop)
}

/// Has this kernel tcx links (Linux 6.6)?
pub(super) fn has_tcx() -> bool {
    answers_tcx() == Some(true)
}

/// As [`has_tcx`], `None` where the kernel may not be asked.
pub(super) fn answers_tcx() -> Option<bool> {
    match SchedClassifier::query_tcx(LOOPBACK, TcAttachType::Ingress) {
        Ok(_) => Some(true),
        Err(ProgramError::SyscallError(error)) if error.call == "bpf_prog_query" => {
            let denied = error.io_error.kind() == io::ErrorKind::PermissionDenied;
            (!denied).then_some(false)
        }
        // It has answered, and then did not show somebody else's program.
        Err(ProgramError::SyscallError(_)) => Some(true),
        Err(_) => None,
    }
}

/// Attaches the steering program to the network namespace the daemon runs in, until its link is dropped.
///
/// # Errors
///
/// When the kernel refuses the program or the attachment (Linux before 5.9).
pub(super) fn attach_steering(ebpf: &mut Ebpf) -> Result<FdLink> {
    let program = loader::sk_lookup(ebpf, "steer_sessions")?;
    let namespace = fs::File::open("/proc/self/ns/net")?;
    let id = program
        .attach(&namespace)
        .context("cannot attach the steering program (needs Linux 5.9)")?;
    Ok(program.take_link(id)?.into())
}

/// Pins the steering program's link, in place of that of an earlier process.
///
/// # Errors
///
/// When the pin cannot be made.
pub(super) fn pin_steering(link: FdLink, pins: &PinDirectory) -> Result<()> {
    pins.unpin(STEERING)?;
    link.pin(pins.pin(STEERING))?;
    Ok(())
}

/// Removes what `attach` left on the interfaces where links cannot be pinned, save on those that `kept` names.
pub(super) fn detach_filters(network: &Network, kept: Option<&Network>) {
    if has_tcx() {
        return;
    }
    let is_kept = |name: &String| {
        kept.is_some_and(|kept| {
            kept.client_interfaces.contains(name) || kept.server_interfaces.contains(name)
        })
    };
    let mut gone = network.clone();
    gone.client_interfaces.retain(|name| !is_kept(name));
    gone.server_interfaces.retain(|name| !is_kept(name));
    clsact::detach(&gone);
}

/// Every named interface has to be there.
///
/// # Errors
///
/// Names the first that is missing, and those that are there.
pub fn check_interfaces(network: &Network) -> Result<()> {
    for interface in network
        .client_interfaces
        .iter()
        .chain(&network.server_interfaces)
    {
        if rustix::net::netdevice::name_to_index(rustix_socket()?, interface).is_err() {
            bail!(
                "there is no interface {interface:?}\n  \
                 Interfaces here: {}.\n  Correct client_interfaces or server_interfaces, or create it first.",
                interfaces().join(", ")
            );
        }
    }
    Ok(())
}

fn rustix_socket() -> Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, socket};
    Ok(socket(AddressFamily::INET, SocketType::DGRAM, None)?)
}

fn interfaces() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    text.lines()
        .skip(2)
        .filter_map(|line| Some(line.split(':').next()?.trim().to_owned()))
        .collect()
}

/// No device behind it, or one of a hypervisor: TC is the better hook there.
fn is_virtual(interface: &str) -> bool {
    let device = Path::new("/sys/class/net").join(interface).join("device");
    match fs::read_link(device.join("driver")) {
        Ok(driver) => driver
            .file_name()
            .is_some_and(|name| name == "virtio_net" || name == "xen-netfront"),
        Err(_) => true,
    }
}
