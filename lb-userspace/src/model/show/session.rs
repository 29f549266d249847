//! `[session]`, and what proxy virtual servers have beside TLS, in the words of the file.

use super::{Table, duration, policy, quoted, snat_word};
use crate::model::session::{LineEndings, Pregreet, PregreetAction, ProxyHeader, Sessions, Terms};

pub(super) fn sessions(sessions: &Sessions) -> Table {
    let times = &sessions.timeouts;
    let mut table = Table::new("session", "session");
    for (key, value) in [
        ("connect_timeout", times.connect),
        ("greeting_timeout", times.greeting),
        ("find_member_timeout", times.find_member),
        ("command_timeout", times.command),
        ("reply_timeout", times.reply),
        ("data_reply_timeout", times.data_reply),
        ("data_block_timeout", times.data_block),
        ("data_end_timeout", times.data_end),
        ("handshake_timeout", times.handshake),
        ("member_handshake_timeout", times.member_handshake),
        ("send_timeout", times.send),
        ("discard_timeout", times.discard),
        ("proxy_header_timeout", times.proxy_header),
        ("drain_timeout", sessions.drain),
    ] {
        table.word(key, &duration(value));
    }
    table.number("max_sessions", sessions.max);
    table.number("max_recipients", sessions.max_recipients);
    table
}

pub(super) fn terms(table: &mut Table, terms: &Terms) {
    table.word("snat", snat_word(&terms.snat));
    table.word(
        "proxy_protocol",
        match terms.proxy_protocol {
            ProxyHeader::None => "none",
            ProxyHeader::V1 => "v1",
            ProxyHeader::V2 => "v2",
        },
    );
    // An empty list would be an error.
    if !terms.accept_proxy_from.is_empty() {
        let trusted = terms.accept_proxy_from.iter();
        let texts: Vec<_> = trusted.flat_map(|range| policy::written(*range)).collect();
        table.list("accept_proxy_from", texts.iter().map(String::as_str));
    }
    if let Some(wait) = terms.detect_implicit_tls {
        table.word("detect_implicit_tls", &duration(wait));
    }
    if let Some(pregreet) = &terms.pregreet {
        table.number("pregreet", shown(pregreet));
    }
    table.word(
        "line_endings",
        match terms.line_endings {
            LineEndings::Strict => "strict",
            LineEndings::Normalize => "normalize",
        },
    );
    for (key, limit) in [
        ("max_sessions", terms.max_sessions),
        ("max_sessions_per_source", terms.max_sessions_per_source),
    ] {
        if let Some(limit) = limit {
            table.number(key, limit);
        }
    }
}

fn shown(pregreet: &Pregreet) -> String {
    let (word, penalty) = match pregreet.action {
        PregreetAction::Log => ("log", None),
        PregreetAction::Delay(penalty) => ("delay", Some(penalty)),
        PregreetAction::Reject => ("reject", None),
    };
    let penalty = penalty.map(|penalty| format!(", penalty = {}", quoted(&duration(penalty))));
    format!(
        "{{ wait = {}, action = {}{} }}",
        quoted(&duration(pregreet.wait)),
        quoted(word),
        penalty.unwrap_or_default()
    )
}
