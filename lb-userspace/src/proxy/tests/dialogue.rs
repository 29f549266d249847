//! Honest sessions on every kind of virtual server.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::peers::{Kind, Lab, PATIENCE, busy, dead, good, until};
use crate::{
    model::StartTls,
    smtp::{end::End, timeouts::Timeouts},
    tls::tests::Pair,
};

const MESSAGE: &str = "Subject: x\r\n\r\n..dots\r\n\u{fc}\r\n.\r\n";
const ENVELOPE: &str = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n";

#[test]
fn plaintext() {
    let lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    let ehlo = client.ask("EHLO c.example");
    assert_eq!(
        ehlo,
        "250-good\r\n250-PIPELINING\r\n250-AUTH PLAIN\r\n250 SIZE\r\n"
    );
    let views = lab.proxy.as_ref().unwrap().sessions();
    assert_eq!((views.len(), views[0].member.as_deref()), (1, Some("m0")));
    client.deliver(MESSAGE);
    client.deliver(MESSAGE);
    client.expect("QUIT", "221 ");
    assert_eq!(client.rest(), b"");
    let message = format!("{ENVELOPE}{MESSAGE}");
    assert_eq!(
        lab.seen(),
        format!("EHLO c.example\r\n{message}{message}QUIT\r\nFIN")
    );
    let end = lab.end();
    assert_eq!(
        (end.end, end.messages, end.recipients, end.last_code),
        (End::Quit, 2, 2, 221)
    );
    let replies = "250 ok\r\n250 ok\r\n354 go\r\n250 2.0.0 taken\r\n".len();
    let replies = "220 good ESMTP\r\n".len() + ehlo.len() + 2 * replies + "221 bye\r\n".len();
    assert_eq!(end.bytes_out, replies as u64);
    assert_eq!(end.tls, None);
    assert_eq!(end.id.to_string(), views[0].id);
    until("the session to leave", || lab.cell.active() == 0);
    assert_eq!(
        (lab.cell.total(), lab.pool.members()[0].counters().active()),
        (1, 0)
    );
    assert_eq!(lab.events()["quit"], 1);
}

#[test]
fn the_last_goodbye_is_heard_out() {
    let mut lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c.example", "250");
    let proxy = lab.proxy.take().unwrap();
    let draining = thread::spawn(move || proxy.drain(PATIENCE));
    assert!(client.reply().starts_with("421 4.3.2 "));
    // A reset for this would take a reply along that the client has not read yet.
    client.send("NOOP\r\n");
    let until = Instant::now() + Duration::from_millis(100);
    while Instant::now() < until {
        assert!(client.stream.take_error().unwrap().is_none());
        thread::yield_now();
    }
    drop(client);
    assert_eq!(draining.join().unwrap().finished, 1);
}

#[test]
fn implicit() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    let mut client = lab.secure(lab.connect());
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    let ehlo = client.ask("EHLO c.example");
    assert_eq!(
        ehlo,
        "250-good\r\n250-PIPELINING\r\n250-AUTH PLAIN\r\n250 SIZE\r\n"
    );
    client.deliver(MESSAGE);
    client.expect("STARTTLS", "503 5.5.1 ");
    client.expect("QUIT", "221 ");
    assert_eq!(
        lab.seen(),
        format!("EHLO c.example\r\n{ENVELOPE}{MESSAGE}QUIT\r\nFIN")
    );
    let tls = lab.end().tls.unwrap();
    assert_eq!(tls.version, "TLSv1.3");
    assert!(tls.suite.starts_with("TLS13_"));
    let group = client.stream.conn.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), rustls::NamedGroup::X25519MLKEM768);
}

#[test]
fn ipv6_and_addresses_of_nobody() {
    let lab = Lab::new(Kind::Plain, &[good]);
    let v6 = lab.v6.unwrap();
    let mut client = lab.connect_to(v6);
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    client.expect("QUIT", "221 ");
    assert_eq!(lab.end().client.ip(), v6.ip());

    lab.services.replace([]);
    assert_eq!(lab.connect().rest(), b"");
    assert_eq!(lab.events()["no-virtual-server"], 1);
}

#[test]
fn older_tls_and_other_keys() {
    for kind in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384] {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let pair = Pair::of(&["mx.example"], kind, |_| {});
            let lab = Lab::of(Kind::Implicit, &[good], Timeouts::DEFAULT, pair);
            let mut client = lab.secure_with(lab.connect(), lab.tls_config_of(&[version]));
            assert_eq!(client.reply(), "220 good ESMTP\r\n");
            client.expect("QUIT", "221 ");
            let name = if version.version == rustls::ProtocolVersion::TLSv1_2 {
                "TLSv1.2"
            } else {
                "TLSv1.3"
            };
            assert_eq!(lab.end().tls.unwrap().version, name);
        }
    }
}

#[test]
fn starttls_required() {
    let lab = Lab::new(Kind::StartTls(StartTls::Require), &[good]);
    let mut client = lab.connect();
    client.reply();
    let ehlo = client.ask("EHLO c.example");
    assert_eq!(
        ehlo,
        "250-good\r\n250-PIPELINING\r\n250-SIZE\r\n250 STARTTLS\r\n"
    );
    client.expect(
        "MAIL FROM:<a@b>",
        "530 5.7.0 Must issue a STARTTLS command first\r\n",
    );
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    client.expect("MAIL FROM:<a@b>", "503 ");
    let ehlo = client.ask("EHLO tls.example");
    assert_eq!(
        ehlo,
        "250-good\r\n250-PIPELINING\r\n250-AUTH PLAIN\r\n250 SIZE\r\n"
    );
    client.deliver(MESSAGE);
    client.expect("QUIT", "221 ");
    let seen = lab.seen();
    assert_eq!(
        seen,
        format!("EHLO c.example\r\nEHLO tls.example\r\n{ENVELOPE}{MESSAGE}QUIT\r\nFIN")
    );
    let end = lab.end();
    assert!(end.starttls_offered && end.starttls_used && end.tls.is_some());
}

#[test]
fn starttls_allowed() {
    let lab = Lab::new(Kind::StartTls(StartTls::Allow), &[good]);
    let mut plain = lab.connect();
    plain.reply();
    assert!(plain.ask("EHLO plain").ends_with("250 STARTTLS\r\n"));
    plain.deliver(MESSAGE);
    plain.expect("QUIT", "221 ");
    assert!(lab.seen().contains(MESSAGE));

    // MAIL before the border: the member behind it knows nothing of that, nor does the client of the change.
    let mut client = lab.connect();
    client.reply();
    client.ask("EHLO c");
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    client.ask("EHLO c");
    assert_eq!(lab.seen(), "EHLO c\r\nMAIL FROM:<a@b>\r\nFIN");
    client.deliver(MESSAGE);
    client.expect("QUIT", "221 ");
    assert_eq!(
        lab.seen(),
        format!("EHLO c\r\n{ENVELOPE}{MESSAGE}QUIT\r\nFIN")
    );
}

#[test]
fn a_large_message_passes_unchanged_through_tls() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    let mut client = lab.secure(lab.connect());
    client.reply();
    client.ask("EHLO c");
    let mut content = String::with_capacity(9 << 20);
    for line in 0..100_000 {
        let dots = if line % 100 == 0 { ".." } else { "" };
        content.push_str(&format!("{dots}{line} {}\r\n", "abcdefgh".repeat(10)));
    }
    content.push_str(".\r\n");
    client.deliver(&content);
    client.expect("QUIT", "221 ");
    let seen = lab.seen();
    assert!(
        seen == format!("EHLO c\r\n{ENVELOPE}{content}QUIT\r\nFIN"),
        "altered on the way"
    );
    let end = lab.end();
    assert!(end.bytes_in > content.len() as u64);
    let traffic = lab
        .cell
        .session_bytes_in
        .load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(traffic, end.bytes_in);
}

#[test]
fn the_next_member_is_tried_unseen() {
    let lab = Lab::new(Kind::Plain, &[busy, dead, good]);
    for _ in 0..3 {
        let mut client = lab.connect();
        assert_eq!(client.reply(), "220 good ESMTP\r\n");
        client.expect("QUIT", "221 ");
    }
    let ends = lab.ends.wait(3);
    assert!(
        ends.iter()
            .all(|end| end.member.as_ref().unwrap().0.as_ref() == "m2")
    );
    assert!(
        lab.pool
            .members()
            .iter()
            .all(|member| member.counters().active() == 0)
    );
}

#[test]
fn nobody_there_is_said_at_once() {
    let lab = Lab::new(Kind::Plain, &[busy, dead]);
    let mut client = lab.connect();
    assert_eq!(client.reply(), "421 busy\r\n");
    assert_eq!(client.rest(), b"");
    assert_eq!(lab.end().end, End::NoMember);

    lab.pool
        .members()
        .iter()
        .for_each(|member| _ = member.set_up(false));
    let mut client = lab.connect();
    assert_eq!(client.reply(), "421 4.3.2 No mail server available\r\n");
}

#[test]
fn drain_ends_idle_sessions_and_waits_for_messages() {
    let mut lab = Lab::new(Kind::Plain, &[good]);
    let mut idle = lab.connect();
    idle.reply();
    let mut busy = lab.connect();
    busy.reply();
    for (command, code) in [
        ("MAIL FROM:<a@b>", "250 "),
        ("RCPT TO:<c@d>", "250 "),
        ("DATA", "354 "),
    ] {
        busy.expect(command, code);
    }
    let proxy = lab.proxy.take().unwrap();
    proxy.stop_accepting();
    let drain = std::thread::spawn(move || proxy.drain(PATIENCE));
    assert_eq!(idle.reply(), "421 4.3.2 Service is shutting down\r\n");
    busy.send("x\r\n.\r\n");
    assert_eq!(busy.reply(), "250 2.0.0 taken\r\n");
    assert_eq!(busy.reply(), "421 4.3.2 Service is shutting down\r\n");
    let report = drain.join().unwrap();
    assert_eq!((report.finished, report.cut), (2, 0));
}

#[test]
fn a_drain_that_takes_too_long_for_somebody_is_cut() {
    let mut lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("DATA", "354 ");
    client.send("half\r\n.\r");
    let proxy = lab.proxy.take().unwrap();
    let cutter = proxy.cutter();
    let drain = std::thread::spawn(move || proxy.drain(std::time::Duration::MAX));
    cutter.cut();
    let report = drain.join().unwrap();
    assert_eq!((report.finished, report.cut), (0, 1));
    assert!(lab.seen().ends_with("LOST"));
    assert_eq!(lab.end().end, End::Cut);
}

#[test]
fn a_deadline_cuts_messages_and_no_member_takes_half_of_one() {
    let mut lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("DATA", "354 ");
    client.send("half\r\n.\r");
    let report = lab
        .proxy
        .take()
        .unwrap()
        .drain(std::time::Duration::from_millis(50));
    assert_eq!((report.finished, report.cut), (0, 1));
    assert!(lab.seen().ends_with("LOST"));
    assert_eq!(lab.end().end, End::Cut);
}
