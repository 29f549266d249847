//! `[session]`, and what proxy virtual servers have beside TLS.

use std::time::Duration;

use super::{single, source};
use crate::{
    config::{
        diagnostic::Faults,
        reader::{At, Field, Section},
    },
    model::{LineEndings, ProxyHeader, policy::Range},
};

/// `[session]`.
pub(in crate::config) struct Session {
    pub(in crate::config) connect: Field<Duration>,
    pub(in crate::config) greeting: Field<Duration>,
    pub(in crate::config) find_member: Field<Duration>,
    pub(in crate::config) command: Field<Duration>,
    pub(in crate::config) reply: Field<Duration>,
    pub(in crate::config) data_reply: Field<Duration>,
    pub(in crate::config) data_block: Field<Duration>,
    pub(in crate::config) data_end: Field<Duration>,
    pub(in crate::config) handshake: Field<Duration>,
    pub(in crate::config) member_handshake: Field<Duration>,
    pub(in crate::config) send: Field<Duration>,
    pub(in crate::config) discard: Field<Duration>,
    pub(in crate::config) proxy_header: Field<Duration>,
    pub(in crate::config) drain: Field<Duration>,
    pub(in crate::config) max: Field<u32>,
    pub(in crate::config) max_recipients: Field<u32>,
}

/// Keys of a proxy virtual server.
pub(in crate::config) struct Terms {
    pub(in crate::config) proxy_protocol: Field<ProxyHeader>,
    pub(in crate::config) accept_proxy_from: Field<Vec<Range>>,
    pub(in crate::config) detect_implicit_tls: Field<Duration>,
    pub(in crate::config) pregreet: Field<Pregreet>,
    pub(in crate::config) line_endings: Field<LineEndings>,
    pub(in crate::config) max_sessions: Field<u32>,
    pub(in crate::config) max_sessions_per_source: Field<u32>,
}

/// `pregreet`.
#[derive(Debug, Clone)]
pub(in crate::config) struct Pregreet {
    pub(in crate::config) object: String,
    pub(in crate::config) wait: Field<Duration>,
    pub(in crate::config) action: Field<PregreetWord>,
    pub(in crate::config) penalty: Field<Duration>,
}

/// `pregreet.action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum PregreetWord {
    Log,
    Delay,
    Reject,
}

/// Most sessions at once, each with two descriptors: what the service unit allows.
const MOST_SESSIONS: u32 = 500_000;
/// Most recipients of a transaction, where there is a limit.
const MOST_RECIPIENTS: u32 = 1_000_000;

pub(super) fn read(top: &mut Section<'_, '_>, faults: &mut Faults) -> Session {
    let mut section = match single(top, "session", faults) {
        Field::Is(section) => Some(section.value),
        Field::Absent | Field::Wrong => None,
    };
    let mut time = |key, example: &str| match &mut section {
        Some(section) => section.duration(key, example, faults),
        None => Field::Absent,
    };
    let mut session = Session {
        connect: time("connect_timeout", "connect_timeout = \"5s\""),
        greeting: time("greeting_timeout", "greeting_timeout = \"2m\""),
        find_member: time("find_member_timeout", "find_member_timeout = \"4m\""),
        command: time("command_timeout", "command_timeout = \"5m\""),
        reply: time("reply_timeout", "reply_timeout = \"5m\""),
        data_reply: time("data_reply_timeout", "data_reply_timeout = \"2m\""),
        data_block: time("data_block_timeout", "data_block_timeout = \"3m\""),
        data_end: time("data_end_timeout", "data_end_timeout = \"10m\""),
        handshake: time("handshake_timeout", "handshake_timeout = \"30s\""),
        member_handshake: time(
            "member_handshake_timeout",
            "member_handshake_timeout = \"10s\"",
        ),
        send: time("send_timeout", "send_timeout = \"3m\""),
        discard: time("discard_timeout", "discard_timeout = \"30s\""),
        proxy_header: time("proxy_header_timeout", "proxy_header_timeout = \"5s\""),
        drain: time("drain_timeout", "drain_timeout = \"30s\""),
        max: Field::Absent,
        max_recipients: Field::Absent,
    };
    if let Some(mut section) = section {
        session.max = limit("max_sessions", &mut section, faults);
        session.max_recipients = section.integer(
            "max_recipients",
            0..=MOST_RECIPIENTS,
            "max_recipients = 1000",
            faults,
        );
        section.finish(faults);
    }
    session
}

impl Terms {
    pub(super) fn read(section: &mut Section<'_, '_>, faults: &mut Faults) -> Self {
        Self {
            proxy_protocol: section.choice(
                "proxy_protocol",
                &[
                    ("none", ProxyHeader::None),
                    ("v1", ProxyHeader::V1),
                    ("v2", ProxyHeader::V2),
                ],
                &[],
                faults,
            ),
            accept_proxy_from: source::list(
                "accept_proxy_from",
                "accept_proxy_from = [\"10.0.0.0/8\"]",
                "Remove the key to take no PROXY protocol header from anybody.",
                section,
                faults,
            ),
            detect_implicit_tls: section.duration(
                "detect_implicit_tls",
                "detect_implicit_tls = \"200ms\"",
                faults,
            ),
            pregreet: pregreet(section, faults),
            line_endings: section.choice(
                "line_endings",
                &[
                    ("strict", LineEndings::Strict),
                    ("normalize", LineEndings::Normalize),
                ],
                &[],
                faults,
            ),
            max_sessions: limit("max_sessions", section, faults),
            max_sessions_per_source: limit("max_sessions_per_source", section, faults),
        }
    }

    /// The keys that are there, with their places, but for `proxy_protocol`.
    pub(in crate::config) fn places(&self) -> impl Iterator<Item = (&'static str, usize)> {
        fn at<T>(field: &Field<T>) -> Option<usize> {
            match field {
                Field::Is(At { at, .. }) => Some(*at),
                Field::Absent | Field::Wrong => None,
            }
        }
        [
            ("accept_proxy_from", at(&self.accept_proxy_from)),
            ("detect_implicit_tls", at(&self.detect_implicit_tls)),
            ("pregreet", at(&self.pregreet)),
            ("line_endings", at(&self.line_endings)),
            ("max_sessions", at(&self.max_sessions)),
            ("max_sessions_per_source", at(&self.max_sessions_per_source)),
        ]
        .into_iter()
        .filter_map(|(key, at)| Some((key, at?)))
    }
}

fn pregreet(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Pregreet> {
    let example = "pregreet = { wait = \"2s\", action = \"reject\" }";
    section
        .table("pregreet", example, faults)
        .and_then(|found| {
            let mut section = found.value;
            let wait = section.duration("wait", "wait = \"2s\"", faults);
            let wait = section.required(
                wait,
                "wait",
                "It would be open how long a client has to be silent.",
                "wait = \"2s\"",
                faults,
            );
            let action = section.choice(
                "action",
                &[
                    ("log", PregreetWord::Log),
                    ("delay", PregreetWord::Delay),
                    ("reject", PregreetWord::Reject),
                ],
                &[],
                faults,
            );
            let action = section.required(
                action,
                "action",
                "It would be open what becomes of a client that talks early.",
                "action = \"reject\"",
                faults,
            );
            let penalty = section.duration("penalty", "penalty = \"10s\"", faults);
            let object = section.object.clone();
            section.finish(faults);
            Some(Pregreet {
                object,
                wait,
                action,
                penalty,
            })
        })
}

fn limit(key: &'static str, section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<u32> {
    section.integer(key, 1..=MOST_SESSIONS, &format!("{key} = 1000"), faults)
}
