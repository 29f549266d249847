//! `[session]`, and what proxy virtual servers have beside TLS.

use std::time::Duration;

use super::{Known, snat, virtual_server::same_family};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{self, Encryption, PregreetWord, Raw},
        reader::{At, Field},
    },
    model::{
        LineEndings, ProxyHeader, Sessions, Snat, Terms,
        policy::Range,
        session::{Pregreet, PregreetAction, SessionTimeouts},
    },
};

/// `pregreet.penalty`.
const DEFAULT_PENALTY: Duration = Duration::from_secs(10);
/// Longest `pregreet.wait`, penalty included, and `detect_implicit_tls`: RFC 5321 §4.5.3.2.1 lets a client give up
/// after five minutes, and a member has its own time to greet.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// `[session]`.
pub(super) fn sessions(raw: &raw::Session, faults: &mut Faults) -> Option<Sessions> {
    let default = Sessions::default();
    let times = SessionTimeouts::DEFAULT;
    for (key, given, least, section) in [
        ("command_timeout", &raw.command, times.command, "7"),
        ("reply_timeout", &raw.reply, times.reply, "2"),
        ("data_reply_timeout", &raw.data_reply, times.data_reply, "4"),
        ("data_block_timeout", &raw.data_block, times.data_block, "5"),
        ("data_end_timeout", &raw.data_end, times.data_end, "6"),
    ] {
        if let Field::Is(At { value, at }) = given
            && *value < least
        {
            faults.warning(
                *at,
                "session",
                format!("has a {key} below {} s", least.as_secs()),
                format!(
                    "RFC 5321 §4.5.3.2.{section} asks for so long; slow peers would be cut off."
                ),
                format!(
                    "Write at least {key} = \"{}s\", unless that is meant.",
                    least.as_secs()
                ),
            );
        }
    }
    doubts(raw, faults)?;
    Some(Sessions {
        timeouts: SessionTimeouts {
            connect: raw.connect.clone().or(times.connect)?,
            greeting: raw.greeting.clone().or(times.greeting)?,
            find_member: raw.find_member.clone().or(times.find_member)?,
            command: raw.command.clone().or(times.command)?,
            reply: raw.reply.clone().or(times.reply)?,
            data_reply: raw.data_reply.clone().or(times.data_reply)?,
            data_block: raw.data_block.clone().or(times.data_block)?,
            data_end: raw.data_end.clone().or(times.data_end)?,
            handshake: raw.handshake.clone().or(times.handshake)?,
            member_handshake: raw.member_handshake.clone().or(times.member_handshake)?,
            send: raw.send.clone().or(times.send)?,
            discard: raw.discard.clone().or(times.discard)?,
            proxy_header: raw.proxy_header.clone().or(times.proxy_header)?,
        },
        drain: raw.drain.clone().or(default.drain)?,
        max: raw.max.clone().or(default.max)?,
        max_recipients: raw.max_recipients.clone().or(default.max_recipients)?,
    })
}

/// A search that is over with the first member that is silent, and lists that RFC 5321 has everybody take.
fn doubts(raw: &raw::Session, faults: &mut Faults) -> Option<()> {
    let times = SessionTimeouts::DEFAULT;
    let given = |field: &Field<Duration>| match field {
        Field::Is(found) => Some(found.at),
        Field::Absent | Field::Wrong => None,
    };
    let greeting = raw.greeting.clone().or(times.greeting)?;
    let find_member = raw.find_member.clone().or(times.find_member)?;
    if let Some(at) = given(&raw.find_member).or(given(&raw.greeting))
        && find_member <= greeting
    {
        faults.warning(
            at,
            "session",
            "has a find_member_timeout that is not longer than its greeting_timeout",
            "One silent member would take all the time; the next one would not be tried.",
            format!(
                "Write at least find_member_timeout = \"{}s\", or a shorter greeting_timeout.",
                2 * greeting.as_secs().max(1)
            ),
        );
    }
    if let Field::Is(At { value: 1..100, at }) = raw.max_recipients {
        faults.warning(
            at,
            "session",
            "has max_recipients below 100",
            "RFC 5321 §4.5.3.1.8 has every server take so many; some clients do not divide shorter lists.",
            "Write at least max_recipients = 100, unless that is meant.",
        );
    }
    Some(())
}

/// What a proxy virtual server has beside TLS.
pub(super) fn terms(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Terms> {
    let snat = snat::choice(raw, known, faults);
    if snat == Some(Snat::None) {
        same_family(raw, known, faults);
        if let Field::Is(At { at, .. }) = &raw.terms.accept_proxy_from {
            faults.warning(
                *at,
                &raw.object,
                "has accept_proxy_from with snat = \"none\"",
                "Members are connected from whatever address a header names, and may trust it more than a client's.",
                "Name only balancers that let nobody else's header through, or set snat = \"automap\" and proxy_protocol.",
            );
        }
    }
    let detect = detect(raw, faults);
    let pregreet = match &raw.terms.pregreet {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(given) => pregreet(given, faults).map(Some),
    };
    Some(Terms {
        snat: snat?,
        proxy_protocol: raw.terms.proxy_protocol.clone().or(ProxyHeader::None)?,
        accept_proxy_from: Range::merged(raw.terms.accept_proxy_from.clone().or(Vec::new())?),
        detect_implicit_tls: detect?,
        pregreet: pregreet?,
        line_endings: raw.terms.line_endings.clone().or(LineEndings::Strict)?,
        max_sessions: optional(&raw.terms.max_sessions)?,
        max_sessions_per_source: optional(&raw.terms.max_sessions_per_source)?,
    })
}

/// Nothing where it is wrong.
fn optional<T: Copy>(field: &Field<T>) -> Option<Option<T>> {
    match field {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(found) => Some(Some(found.value)),
    }
}

fn detect(raw: &raw::VirtualServer<'_>, faults: &mut Faults) -> Option<Option<Duration>> {
    let detect = optional(&raw.terms.detect_implicit_tls)?;
    let Field::Is(At { at, value }) = raw.terms.detect_implicit_tls else {
        return Some(detect);
    };
    if matches!(raw.client.tls, Field::Absent)
        || matches!(
            raw.client.tls.get(),
            Some(Encryption::None | Encryption::Implicit)
        )
    {
        faults.error(
            at,
            &raw.object,
            "has detect_implicit_tls without client_tls = \"starttls\"",
            "There would be no choice between the two ways into TLS.",
            "Remove it, or set client_tls = \"starttls\".",
        );
        return None;
    }
    bounded("detect_implicit_tls", value, at, &raw.object, faults)?;
    Some(detect)
}

fn pregreet(given: &At<raw::Pregreet>, faults: &mut Faults) -> Option<Pregreet> {
    let pregreet = &given.value;
    let word = *pregreet.action.get()?;
    if let (Field::Is(penalty), PregreetWord::Log | PregreetWord::Reject) =
        (&pregreet.penalty, word)
    {
        faults.error(
            penalty.at,
            &pregreet.object,
            "has a penalty without action = \"delay\"",
            "Nobody would be kept waiting.",
            "Remove it, or set action = \"delay\".",
        );
        return None;
    }
    let wait = *pregreet.wait.get()?;
    let penalty = pregreet.penalty.clone().or(DEFAULT_PENALTY)?;
    bounded("wait", wait, given.at, &pregreet.object, faults)?;
    bounded("penalty", penalty, given.at, &pregreet.object, faults)?;
    Some(Pregreet {
        wait,
        action: match word {
            PregreetWord::Log => PregreetAction::Log,
            PregreetWord::Delay => PregreetAction::Delay(penalty),
            PregreetWord::Reject => PregreetAction::Reject,
        },
    })
}

fn bounded(key: &str, value: Duration, at: usize, object: &str, faults: &mut Faults) -> Option<()> {
    if value <= LONGEST_WAIT {
        return Some(());
    }
    faults.error(
        at,
        object,
        format!("has {key} = {} s, which is too long", value.as_secs()),
        "Clients give up when they are not greeted in time (RFC 5321 §4.5.3.2.1).",
        format!("{} s is the most.", LONGEST_WAIT.as_secs()),
    );
    None
}

/// A SNAT pool gives ports to one plane: the other would give out the same.
pub(super) fn planes(raw: &Raw<'_>, faults: &mut Faults) {
    for pool in &raw.snat_pools {
        let users = || {
            raw.virtual_servers
                .iter()
                .filter(|server| server.snat.get() == Some(&pool.name.value))
        };
        let of = |plane| users().find(move |server| server.forward.get() == Some(&plane));
        let Some(proxy) = of(raw::Plane::Proxy) else {
            continue;
        };
        let Field::Is(at) = &proxy.snat else { continue };
        if let Some(passthrough) = of(raw::Plane::Passthrough) {
            faults.error(
                at.at,
                &proxy.object,
                format!(
                    "uses the SNAT pool {} of {}",
                    quoted(pool.name.value),
                    passthrough.object
                ),
                "The two planes could give the same port to two connections.",
                "Give each plane a SNAT pool of its own.",
            );
        }
        let ports = match (&pool.ports, &pool.exclude) {
            (Field::Is(ports), _) => Some(("ports", ports.at)),
            (_, Field::Is(ports)) if !ports.value.is_empty() => Some(("exclude", ports.at)),
            _ => None,
        };
        if let Some((key, at)) = ports {
            faults.error(
                at,
                &pool.object,
                format!("has {key}, which has no meaning for {}", proxy.object),
                "The kernel chooses the ports of the proxy plane, from net.ipv4.ip_local_port_range.",
                "Remove it, and set that range.",
            );
        }
        if matches!(&raw.network.server_interfaces, Field::Absent)
            || raw
                .network
                .server_interfaces
                .get()
                .is_some_and(Vec::is_empty)
        {
            faults.error(
                at.at,
                &proxy.object,
                format!(
                    "uses the SNAT pool {} without server_interfaces",
                    quoted(pool.name.value)
                ),
                "Its addresses would be on no interface.",
                "Add for example `server_interfaces = [\"eth1\"]` to [network].",
            );
        }
    }
}
