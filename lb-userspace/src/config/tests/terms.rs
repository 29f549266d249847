//! `[session]`, and what proxy virtual servers have beside TLS.

use std::time::Duration;

use super::{accepted::accepted, *};
use crate::model::{
    Forward, LineEndings, ProxyHeader, Sessions, Snat, Terms,
    policy::Range,
    session::{Pregreet, PregreetAction},
};

#[test]
fn a_proxy_has_terms_beside_tls() {
    let terms = |lines: &str| {
        let file = BASE.replace("proxy_protocol = \"none\"", lines);
        let file = file.replace("type = \"smtp\"", "type = \"tcp\"");
        let file = file.replace("helo = \"lb.example.org\"", "");
        // Some of them hide the clients, which is told.
        let (generation, _) = parse("smtplb.toml", &file).unwrap();
        match &generation.virtual_servers[1].forward {
            Forward::Proxy { terms, .. } => terms.clone(),
            Forward::Passthrough { .. } => panic!("a proxy"),
        }
    };
    let prefix = |text: &str, length| Range::prefix(text.parse().unwrap(), length);
    let all = terms(
        "snat = \"automap\"\nproxy_protocol = \"v2\"\ndetect_implicit_tls = \"200ms\"\n\
         accept_proxy_from = [\"10.9.0.0/16 10.8.0.0/16\", \"2001:db8::1\"]\n\
         pregreet = { wait = \"2s\", action = \"delay\", penalty = \"5s\" }\nline_endings = \"normalize\"\n\
         max_sessions = 1000\nmax_sessions_per_source = 10",
    );
    assert_eq!(
        all,
        Terms {
            snat: Snat::Automap,
            proxy_protocol: ProxyHeader::V2,
            accept_proxy_from: vec![prefix("10.8.0.0", 15), prefix("2001:db8::1", 128)],
            detect_implicit_tls: Some(Duration::from_millis(200)),
            pregreet: Some(Pregreet {
                wait: Duration::from_secs(2),
                action: PregreetAction::Delay(Duration::from_secs(5)),
            }),
            line_endings: LineEndings::Normalize,
            max_sessions: Some(1000),
            max_sessions_per_source: Some(10),
        }
    );
    assert_eq!(terms(""), Terms::default());
    assert_eq!(
        terms("proxy_protocol = \"v1\"").proxy_protocol,
        ProxyHeader::V1
    );
    let action = |text: &str| {
        let pregreet = terms(&format!("pregreet = {{ wait = \"1s\", {text} }}")).pregreet;
        pregreet.unwrap().action
    };
    assert_eq!(action("action = \"log\""), PregreetAction::Log);
    assert_eq!(action("action = \"reject\""), PregreetAction::Reject);
    let penalty = Duration::from_secs(10);
    assert_eq!(action("action = \"delay\""), PregreetAction::Delay(penalty));
}

#[test]
fn announced_addresses_as_sources_are_a_warning() {
    let lines = "snat = \"none\"\naccept_proxy_from = [\"10.9.0.5\"]";
    let file = BASE.replace("proxy_protocol = \"none\"", lines);
    let (generation, warnings) = parse("smtplb.toml", &file).unwrap();
    assert_eq!(
        text(&warnings),
        "smtplb.toml:23:21: warning: virtual server \"submission\" has accept_proxy_from with snat = \"none\"\n  \
         Members are connected from whatever address a header names, and may trust it more than a client's.\n  \
         Name only balancers that let nobody else's header through, or set snat = \"automap\" and proxy_protocol."
    );
    let Forward::Proxy { terms, .. } = &generation.virtual_servers[1].forward else {
        panic!("a proxy")
    };
    assert_eq!(terms.snat, Snat::None);
    accepted(&file.replace("snat = \"none\"", "proxy_protocol = \"none\""));
}

#[test]
fn waits_and_limits_of_sessions_reach_the_model() {
    let defaults = accepted(BASE).session;
    assert_eq!(defaults, Sessions::default());
    let keys = [
        "connect",
        "greeting",
        "find_member",
        "command",
        "reply",
        "data_reply",
        "data_block",
        "data_end",
        "handshake",
        "member_handshake",
        "send",
        "discard",
        "proxy_header",
        "drain",
    ];
    let lines = keys
        .iter()
        .zip(1000..)
        .map(|(key, time)| format!("{key}_timeout = \"{time}s\"\n"));
    let file = format!(
        "{BASE}\n[session]\nmax_sessions = 17\nmax_recipients = 0\n{}",
        lines.collect::<String>()
    );
    let session = accepted(&file).session;
    let times = session.timeouts;
    let found = [
        times.connect,
        times.greeting,
        times.find_member,
        times.command,
        times.reply,
        times.data_reply,
        times.data_block,
        times.data_end,
        times.handshake,
        times.member_handshake,
        times.send,
        times.discard,
        times.proxy_header,
        session.drain,
    ];
    for (time, expected) in found.into_iter().zip(1000..) {
        assert_eq!(time, Duration::from_secs(expected));
    }
    assert_eq!((session.max, session.max_recipients), (17, 0));
}

fn warned(session: &str) -> String {
    let file = format!("{BASE}\n[session]\n{session}");
    text(&parse("smtplb.toml", &file).unwrap().1)
}

#[test]
fn limits_of_sessions_that_hardly_anybody_means_are_told() {
    assert_eq!(
        warned("command_timeout = \"299s\""),
        "smtplb.toml:60:19: warning: session has a command_timeout below 300 s\n  \
         RFC 5321 §4.5.3.2.7 asks for so long; slow peers would be cut off.\n  \
         Write at least command_timeout = \"300s\", unless that is meant."
    );
    for session in [
        "greeting_timeout = \"4m\"",
        "find_member_timeout = \"4m\"\ngreeting_timeout = \"4m\"",
    ] {
        let heard = warned(session);
        let (_, heard) = heard.split_once(": warning: ").unwrap();
        assert_eq!(
            heard,
            "session has a find_member_timeout that is not longer than its greeting_timeout\n  \
             One silent member would take all the time; the next one would not be tried.\n  \
             Write at least find_member_timeout = \"480s\", or a shorter greeting_timeout."
        );
    }
    assert_eq!(
        warned("max_recipients = 99"),
        "smtplb.toml:60:18: warning: session has max_recipients below 100\n  \
         RFC 5321 §4.5.3.1.8 has every server take so many; some clients do not divide shorter lists.\n  \
         Write at least max_recipients = 100, unless that is meant."
    );
    for fine in [
        "max_recipients = 100",
        "max_recipients = 0",
        "greeting_timeout = \"239s\"",
    ] {
        assert_eq!(warned(fine), "");
    }
}
