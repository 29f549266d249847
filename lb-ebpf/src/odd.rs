//! Packets that need more looking at than most: VLAN tags, fragments, extension headers, ways back that no routing table
//! knows.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::{Flow, Hit, LOOPBACK},
    layout::Jump,
    reason::DropReason,
    service::Service,
    tcp::{Direction, Flags, Phase, plausible, tick},
    vlan::outer,
};

use crate::{
    Egress, Frame, Packet, Tables, Verdict,
    flow::{self, Note},
    forward,
    parse::{Deep, Link, Part},
    rewrite, service, shift,
};

/// Carries such a packet when it belongs to a connection, and says who goes on with the first of one.
///
/// # Errors
///
/// The reason why a packet that belongs to a virtual server was not carried.
#[inline(always)]
pub fn odd<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    let Some(deep) = frame.deep(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    if deep.part == Part::Cut {
        return match config.concerns(&deep.packet.key.dst) {
            true => Err(DropReason::HiddenHeader),
            false => Ok(Verdict::Pass),
        };
    }
    let hit = match deep.part {
        Part::Later => tables
            .fragment(&deep.fragment())
            .filter(|hit| belongs(tables, *hit, deep)),
        Part::Whole | Part::First | Part::Cut => flow::find(tables, &deep.packet),
    };
    let Some(hit) = hit else {
        if deep.part == Part::Later {
            tables.note_early(&deep.fragment());
            return Ok(Verdict::Pass);
        }
        let key = &deep.packet.key;
        let Some(service) = service::find(tables, config, &key.dst, key.dport) else {
            return Ok(Verdict::Pass);
        };
        if service.forward != Service::GONE {
            check_vlan(tables, deep.link.vlan)?;
        }
        return crate::first::<F, T>(tables, config, service, &deep.packet);
    };
    if hit.direction() == Direction::Forward {
        check_vlan(tables, deep.link.vlan)?;
    }
    carry(frame, tables, deep, hit, egress)
}

/// What becomes of a packet that was not carried: behind tags its sender is told by us, where the stack would have. A RST is
/// never answered (RFC 9293 §3.10.7.1).
///
/// # Errors
///
/// The same reason, for all others.
#[inline(always)]
pub fn refuse<F: Frame>(frame: &mut F, reason: DropReason) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    if reason.is_told()
        && let Ok(Some(deep)) = frame.deep(&mut room)
        && deep.link.vlan != 0
        && !deep.packet.flags.any(Flags::RST)
    {
        return Ok(Verdict::Reset(reason));
    }
    Err(reason)
}

/// Rewrites such a packet of a flow and finds its way out.
#[inline(always)]
pub(crate) fn carry<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    deep: &Deep,
    hit: Hit,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    if shift::concerns(flow) && deep.part != Part::Later {
        return Ok(Verdict::Jump(Jump::Shift));
    }
    let (direction, now, packet) = (hit.direction(), tables.now(), &deep.packet);
    if let Err(reason) = forward::way(frame, packet, flow, direction, now, egress) {
        tables.withdraw(hit.slot());
        return Err(reason);
    }
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    if !F::ASKS && flow.vlan.load(Relaxed) == LOOPBACK {
        return Ok(Verdict::Pass);
    }
    if direction == Direction::Forward {
        note_way_back(frame, flow, deep, now)?;
    }
    let to = &flow.route.leave[direction as usize & 1];
    if deep.part == Part::Later {
        // No more than that it came: its numbers are those of the first fragment.
        let note = Note {
            way: (direction, Flags::default()),
            next: 0,
            acknowledgement: 0,
            length: packet.length,
            data: false,
        };
        tables.track(hit.slot(), &note);
        rewrite::header(frame, packet, to).map_err(|_| DropReason::Internal)?;
    } else {
        if deep.part == Part::First {
            tables.note_fragment(&deep.fragment(), hit);
        }
        tables.track(hit.slot(), &Note::of(packet, direction));
        rewrite::apply(frame, packet, to, deep.part == Part::First)
            .map_err(|_| DropReason::Internal)?;
    }
    leave(frame, &deep.link, flow, direction, egress)
}

/// Writes the link layer of a packet that is otherwise complete.
#[inline(always)]
pub(crate) fn leave<F: Frame>(
    frame: &mut F,
    link: &Link,
    flow: &Flow,
    direction: Direction,
    egress: &Egress,
) -> Result<Verdict, DropReason> {
    let vlan = match direction {
        Direction::Forward => 0,
        Direction::Reverse => match flow.vlan.load(Relaxed) {
            LOOPBACK => 0,
            vlan => vlan,
        },
    };
    frame.address(egress)?;
    if link.vlan != 0 || link.inside != 0 || link.outside || vlan != 0 {
        frame.retag(link, vlan)?;
    }
    Ok(Verdict::Send)
}

/// Remembers where packets come from of a client that no routing table leads to: a tagged one, or one on the box itself.
/// Replies go back the same way, until one comes by another.
#[inline(always)]
pub(crate) fn note_way_back<F: Frame>(
    frame: &F,
    flow: &Flow,
    deep: &Deep,
    now: u64,
) -> Result<(), DropReason> {
    let interface = frame.ingress();
    let vlan = if interface == LOOPBACK_INTERFACE {
        LOOPBACK
    } else {
        deep.link.vlan
    };
    let way = &flow.ways[Direction::Reverse as usize];
    let same = flow.vlan.load(Relaxed) == vlan;
    if same && (vlan == 0 || way.resolved.load(Relaxed) == tick(now)) {
        return Ok(());
    }
    if !is_client(flow, &deep.packet) {
        return Ok(());
    }
    if vlan == 0 {
        way.resolved.store(0, Relaxed);
        flow.vlan.store(0, Relaxed);
        return Ok(());
    }
    let [a, b, c, d, e, f]: [u16; 6] = frame.load(0)?;
    way.interface.store(interface, Relaxed);
    // Destination and source change places.
    for (to, pair) in way.macs.iter().zip([[d, e], [f, a], [b, c]]) {
        to.store(crate::frame::word(pair), Relaxed);
    }
    way.mtu.store(frame.link_mtu(interface), Relaxed);
    way.resolved.store(tick(now), Relaxed);
    flow.vlan.store(vlan, Relaxed);
    Ok(())
}

/// Does a packet know how far both sides are? Nobody can tell by its addresses who has sent it, and replies shall not be led
/// away by a guess. A client whose connection is half-open has nothing to show yet.
#[inline(always)]
fn is_client(flow: &Flow, packet: &Packet) -> bool {
    let [own, other] = [0, 1].map(|side| flow.next[side].load(Relaxed));
    let heard = packet
        .acknowledgement
        .wrapping_sub(flow.shift[1].load(Relaxed));
    let knows =
        packet.flags.any(Flags::ACK) & plausible(packet.sequence, own) & plausible(heard, other);
    knows | (flow.phase.load(Relaxed) == Phase::Syn as u32)
}

/// Index of the interface `lo`, the same in every network namespace (linux/net_namespace.h).
const LOOPBACK_INTERFACE: u32 = 1;

/// Is a tagged frame of a VLAN that clients may use?
#[inline(always)]
pub(crate) fn check_vlan<T: Tables>(tables: &T, vlan: u32) -> Result<(), DropReason> {
    if vlan != 0 && !tables.vlan_allowed(outer(vlan)) {
        return Err(DropReason::ForeignVlan);
    }
    Ok(())
}

/// Is a later fragment really of this flow? Its record may be another's since its first fragment.
#[inline(always)]
fn belongs<T: Tables>(tables: &T, hit: Hit, deep: &Deep) -> bool {
    let Some(flow) = tables.flow(hit.slot()) else {
        return false;
    };
    let other = &flow.route.leave[(hit.direction() as usize & 1) ^ 1];
    let live = Phase::is_live(flow.phase.load(Relaxed));
    live && other.src == deep.packet.key.dst && other.dst == deep.packet.key.src
}
