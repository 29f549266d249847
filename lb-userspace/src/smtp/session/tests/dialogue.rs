//! What honest peers say.

use super::*;

const MESSAGE: &str = "MAIL FROM:<a@b> SIZE=20 BODY=8BITMIME\r\nRCPT TO:<c@d>\r\n";

#[test]
fn a_plain_session_passes_unchanged() {
    let mut lab = Lab::new(ClientSecurity::None);
    lab.exchange("HELO c.example\r\n", "250 mx1\r\n");
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("RCPT TO:<c@d>\r\n", "250-yes\r\n250 really\r\n");
    lab.exchange("DATA\r\n", "354 go\r\n");
    assert_eq!(lab.phase(), Phase::Data);
    lab.exchange("Subject: x\r\n\r\n..dot\r\n.\r\n", "250 taken\r\n");
    lab.exchange("vrfy me\r\n", "252 maybe\r\n");
    lab.exchange("XYZZY now\r\n", "500 what\r\n");
    lab.exchange("QUIT\r\n", "221 bye\r\n");
    assert_eq!(lab.end, Some(End::Quit));
    assert!(!lab.aborted);
    let facts = lab.session.facts();
    assert_eq!(
        (facts.messages, facts.recipients, facts.last_code),
        (1, 1, 221)
    );
    assert_eq!(facts.helo.as_deref(), Some(&b"c.example"[..]));
}

#[test]
fn plaintext_services_show_no_starttls() {
    let mut lab = Lab::new(ClientSecurity::None);
    lab.sends("EHLO c\r\n");
    lab.says(CAPABLE);
    let shown = "250-mx1\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-AUTH PLAIN\r\n250 SIZE 1000\r\n";
    assert_eq!(lab.heard(), shown);
    lab.reached();
    lab.refused("STARTTLS\r\n", "502 5.5.1 ");
}

#[test]
fn pipelined_commands_go_together_and_replies_come_in_order() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends(format!("{MESSAGE}DATA\r\n"));
    assert_eq!(lab.reached(), format!("{MESSAGE}DATA\r\n"));
    lab.says("250 a\r\n250 b\r\n354 c\r\n");
    assert_eq!(lab.heard(), "250 a\r\n250 b\r\n354 c\r\n");
    lab.exchange("x\r\n.\r\n", "250 taken\r\n");
}

#[test]
fn local_replies_wait_for_their_turn() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("MAIL FROM:<a@b>\r\nXCLIENT NAME=x\r\nRCPT TO:<c@d>\r\n");
    assert_eq!(lab.reached(), "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n");
    assert_eq!(lab.heard(), "");
    lab.says("250 mail\r\n");
    assert_eq!(
        lab.heard(),
        "250 mail\r\n550 5.7.1 Not accepted from a client\r\n"
    );
    lab.says("250 rcpt\r\n");
    assert_eq!(lab.heard(), "250 rcpt\r\n");
}

#[test]
fn a_member_without_pipelining_gets_one_command_at_a_time() {
    let mut lab = Lab::new(ClientSecurity::None);
    lab.exchange("HELO c\r\n", "250 mx1\r\n");
    lab.sends("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\n");
    for (line, reply) in [
        ("MAIL FROM:<a@b>", "250 1"),
        ("RCPT TO:<c@d>", "550 2"),
        ("RCPT TO:<e@f>", "250 3"),
    ] {
        assert_eq!(lab.reached(), format!("{line}\r\n"));
        lab.says(format!("{reply}\r\n"));
        assert_eq!(lab.heard(), format!("{reply}\r\n"));
    }
}

#[test]
fn several_messages_in_one_session() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    for _ in 0..3 {
        lab.sends(format!("{MESSAGE}DATA\r\n"));
        lab.says("250 a\r\n250 b\r\n354 c\r\n");
        // The next group may follow the end of data (RFC 2920 §3.1).
        lab.sends("x\r\n.\r\nRSET\r\n");
        assert_eq!(lab.reached(), format!("{MESSAGE}DATA\r\nx\r\n.\r\n"));
        lab.says("250 taken\r\n");
        assert_eq!(lab.reached(), "RSET\r\n");
        lab.says("250 reset\r\n");
        lab.heard();
    }
    assert_eq!(lab.session.facts().messages, 3);
}

#[test]
fn chunks_are_counted_and_untouched() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    let chunks = "BDAT 9\r\nQUIT\r\n\0\n.BDAT 5 LAST\r\n\r\n.\r\n";
    lab.sends(format!("{MESSAGE}{chunks}"));
    assert_eq!(lab.reached(), format!("{MESSAGE}{chunks}"));
    lab.says("250 a\r\n250 b\r\n250 c\r\n250 d\r\n");
    assert_eq!(lab.heard(), "250 a\r\n250 b\r\n250 c\r\n250 d\r\n");
    assert_eq!(lab.session.facts().messages, 1);
    lab.exchange("BDAT 0 LAST\r\n", "503 no mail\r\n");
    lab.exchange("NOOP\r\n", "250 ok\r\n");
}

#[test]
fn octets_of_a_chunk_may_pass_unseen_and_nothing_else() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends(MESSAGE);
    assert_eq!(lab.session.unseen(), 0);
    lab.sends("BDAT 5000\r\nabc");
    assert_eq!(lab.session.unseen(), 4997);
    // Enough of it starts the wait anew, as if it had been seen.
    let before = lab.session.deadline();
    lab.now += Duration::from_secs(1);
    lab.session.take_unseen(1000, lab.now);
    assert_eq!(lab.session.deadline(), before);
    lab.session.take_unseen(21, lab.now);
    assert_eq!(
        lab.session.deadline(),
        before.map(|it| it + Duration::from_secs(1))
    );
    assert_eq!((lab.session.unseen(), lab.phase()), (3976, Phase::Bdat));
    lab.session.take_unseen(3976, lab.now);
    assert_eq!(lab.session.unseen(), 0);
    lab.reached();
    lab.sends("RSET\r\n");
    assert_eq!(lab.reached(), "RSET\r\n");
}

#[test]
fn an_auth_exchange_passes_and_its_lines_are_no_commands() {
    let mut lab = Lab::greeted(ClientSecurity::Implicit);
    lab.exchange("AUTH LOGIN\r\n", "334 VXNlcg==\r\n");
    assert_eq!(lab.phase(), Phase::Auth);
    lab.exchange("STARTTLS\r\n", "334 UGFzcw==\r\n");
    lab.exchange("*\r\n", "501 cancelled\r\n");
    lab.exchange("NOOP\r\n", "250 ok\r\n");
}

#[test]
fn the_next_member_is_tried_before_the_greeting() {
    for refusal in [
        "421 busy\r\n",
        "554-no\r\n554 no\r\n",
        "hello\r\n",
        "220 a\r\n250 b\r\n",
    ] {
        let mut lab = Lab::silent(ClientSecurity::None);
        lab.says(refusal);
        assert_eq!((lab.connects, lab.heard().as_str()), (2, ""), "{refusal:?}");
        lab.session.member_connected(OWN, lab.now);
        lab.says("220-second\r\n220 member\r\n");
        assert_eq!(lab.heard(), "220-second\r\n220 member\r\n");
    }
    let mut lab = Lab::silent(ClientSecurity::None);
    lab.session.member_closed(lab.now);
    lab.offer();
    assert_eq!(lab.connects, 2);
    lab.session.no_member();
    lab.offer();
    assert_eq!(lab.heard(), "421 4.3.2 No mail server available\r\n");
    assert_eq!(lab.end, Some(End::NoMember));
}

#[test]
fn a_greeting_that_refuses_is_passed_on_when_nobody_else_is_left() {
    const OURS: &str = "421 4.3.2 No mail server available\r\n";
    for (greetings, heard) in [
        (&["554-no\r\n554 entry\r\n"][..], "554-no\r\n554 entry\r\n"),
        (&["421 busy\r\n"], "421 busy\r\n"),
        (&["421 busy\r\n", "554 no\r\n"], "421 busy\r\n"),
        (&["554 no\r\n", "450 later\r\n"], "450 later\r\n"),
        (&["554 no\r\n", "junk\r\n"], OURS),
        (&["554 no\r\n", ""], OURS),
        (&["250 what\r\n"], OURS),
        (&["554 no\r\n250 ok\r\n"], OURS),
    ] {
        let mut lab = Lab::silent(ClientSecurity::None);
        for (at, greeting) in greetings.iter().enumerate() {
            if at > 0 {
                lab.session.member_connected(OWN, lab.now);
            }
            lab.says(greeting);
            if greeting.is_empty() {
                lab.wait(Timeouts::DEFAULT.greeting);
            }
        }
        lab.session.no_member();
        lab.offer();
        assert_eq!(lab.heard(), heard, "{greetings:?}");
        assert_eq!(lab.end, Some(End::NoMember));
    }
    // One that could not be asked may still take the mail.
    let mut lab = Lab::silent(ClientSecurity::None);
    lab.says("554 no\r\n");
    lab.session.member_missed();
    lab.session.no_member();
    lab.offer();
    assert_eq!(lab.heard(), OURS);
}

#[test]
fn a_client_that_pipes_everything_and_closes_its_side_is_served() {
    let mut lab = Lab::silent(ClientSecurity::None);
    lab.sends("HELO c\r\nQUIT\r\n");
    lab.session.client_closed(lab.now);
    lab.says("220 mx1\r\n");
    lab.says("250 mx1\r\n");
    assert_eq!(lab.end, None);
    lab.says("221 bye\r\n");
    assert_eq!(lab.heard(), "220 mx1\r\n250 mx1\r\n221 bye\r\n");
    assert_eq!(lab.end, Some(End::Quit));
}

#[test]
fn draining_ends_between_messages_only() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.session.drain(lab.now);
    lab.offer();
    assert_eq!(lab.heard(), "421 4.3.2 Service is shutting down\r\n");
    assert_eq!(lab.end, Some(End::Drained));

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.session.drain(lab.now);
    lab.exchange("RCPT TO:<c@d>\r\n", "250 ok\r\n");
    lab.exchange("DATA\r\n", "354 go\r\n");
    assert_eq!(lab.end, None);
    lab.sends("x\r\n.\r\n");
    lab.says("250 taken\r\n");
    assert_eq!(
        lab.heard(),
        "250 taken\r\n421 4.3.2 Service is shutting down\r\n"
    );
    assert!(!lab.aborted);
}

#[test]
fn draining_ends_a_client_that_always_has_more_to_say() {
    const SHUTDOWN: &str = "421 4.3.2 Service is shutting down\r\n";
    for end in [".\r\n", "BDAT 2 LAST\r\nxx"] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.exchange(MESSAGE, "250 a\r\n250 b\r\n");
        if end == ".\r\n" {
            lab.exchange("DATA\r\n", "354 c\r\n");
        }
        lab.session.drain(lab.now);
        lab.sends(format!("{end}{MESSAGE}DATA\r\n"));
        assert_eq!((lab.reached().as_str(), lab.end), (end, None));
        lab.says("250 taken\r\n");
        assert_eq!(lab.heard(), format!("250 taken\r\n{SHUTDOWN}"));
        assert_eq!((lab.end, lab.aborted), (Some(End::Drained), false));
        lab.sends("x\r\n.\r\n");
        assert_eq!((lab.reached(), lab.heard()), Default::default());
        assert!(lab.backlog.is_empty());
    }
    // It closed its side meanwhile.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange(MESSAGE, "250 a\r\n250 b\r\n");
    lab.exchange("DATA\r\n", "354 c\r\n");
    lab.sends("x\r\n.\r\nQUIT\r\n");
    lab.session.client_closed(lab.now);
    lab.session.drain(lab.now);
    lab.says("250 taken\r\n");
    assert_eq!(lab.heard(), format!("250 taken\r\n{SHUTDOWN}"));
}

/// Every outcome of a dialogue, whatever pieces it came in.
fn play(
    security: ClientSecurity,
    script: &[(&str, &str)],
    cut: impl Fn(&str) -> Vec<String>,
) -> String {
    let mut lab = Lab::silent(security);
    let mut log = String::new();
    for (client, member) in script {
        cut(client).iter().for_each(|piece| lab.sends(piece));
        log += &format!("M<{}>", lab.reached());
        cut(member).iter().for_each(|piece| lab.says(piece));
        log += &format!("C<{}>", lab.heard());
        if lab.border && lab.session.open_border(lab.now) {
            lab.session.tls_established(lab.now);
            lab.offer();
            log += &format!("T<{}>", lab.heard());
        }
    }
    format!(
        "{log} {:?} {} {:?}",
        lab.end,
        lab.aborted,
        lab.session.facts()
    )
}

#[test]
fn cut_at_every_byte_is_the_same() {
    let plain: &[(&str, &str)] = &[
        ("", "220-hello\r\n220 mx1\r\n"),
        ("EHLO c.example\r\n", CAPABLE),
        ("STARTTLS now\r\nXFORWARD x\r\nNO\nOP\r\n", ""),
        (
            "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
            "250 a\r\n250-b\r\n250 c\r\n354 go\r\n",
        ),
        ("a\r\n..\r\n.x\r\n\r\n\u{fc}\r\n.\r\n", "250 taken\r\n"),
        (
            "BDAT 7\r\nQUIT\r\n.BDAT 3 LAST\r\n\r\n.",
            "250 1\r\n250 2\r\n",
        ),
        ("AUTH LOGIN\r\n", "334 x\r\n"),
        ("QUIT\r\n", "235 in\r\n"),
        ("RSET\r\n", "250 ok\r\n"),
        ("QUIT\r\n", "221 bye\r\n"),
    ];
    let border: &[(&str, &str)] = &[
        ("", "220 mx1\r\n"),
        ("EHLO c.example\r\n", CAPABLE),
        ("MAIL FROM:<a@b>\r\n", ""),
        ("STARTTLS\r\n", ""),
        ("MAIL FROM:<a@b>\r\n", ""),
        ("EHLO c.example\r\n", CAPABLE),
        ("MAIL FROM:<a@b>\r\n", "250 ok\r\n"),
        ("RCPT TO:<c@d>\r\n", "250 ok\r\n"),
        ("DATA\r\n", "354 go\r\n"),
        // What of a refused message got out before its fault depends on the pieces.
        ("\rb\r\n.\r\n", ""),
    ];
    for (security, script) in [
        (ClientSecurity::None, plain),
        (ClientSecurity::Implicit, plain),
        (REQUIRE, border),
    ] {
        let whole = play(security, script, |text| vec![text.to_owned()]);
        let longest = script
            .iter()
            .map(|(c, m)| c.len().max(m.len()))
            .max()
            .unwrap_or(0);
        for at in 1..longest {
            let cut = |text: &str| {
                let (one, two) = text.as_bytes().split_at(at.min(text.len()));
                [one, two]
                    .iter()
                    .map(|part| String::from_utf8_lossy(part).into_owned())
                    .collect()
            };
            // Halves of a character would change in the conversion; they are covered below.
            if script.iter().all(|(c, m)| {
                c.is_char_boundary(at.min(c.len())) && m.is_char_boundary(at.min(m.len()))
            }) {
                assert_eq!(play(security, script, cut), whole, "cut at {at}");
            }
        }
        let letters = |text: &str| text.chars().map(String::from).collect();
        assert_eq!(play(security, script, letters), whole);
    }
}

#[test]
fn pipelined_and_alternating_clients_get_the_same() {
    let commands = [
        "MAIL FROM:<a@b>\r\n",
        "RCPT TO:<c@d>\r\n",
        "RCPT TO:<x@y>\r\n",
        "DATA\r\n",
    ];
    let replies = ["250 1\r\n", "250 2\r\n", "550 3\r\n", "354 4\r\n"];
    let mut together = Lab::greeted(ClientSecurity::None);
    together.sends(commands.concat());
    together.says(replies.concat());
    let mut apart = Lab::greeted(ClientSecurity::None);
    for (command, reply) in commands.iter().zip(replies) {
        apart.sends(command);
        apart.says(reply);
    }
    assert_eq!(together.heard(), apart.heard());
    assert_eq!(together.reached(), apart.reached());
    assert_eq!(together.session.facts(), apart.session.facts());
}

#[test]
fn a_reset_that_is_refused_leaves_the_message_open() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("BDAT 4\r\nhalf", "250 ok\r\n");
    lab.exchange("RSET\r\n", "451 no\r\n");
    lab.session.client_closed(lab.now);
    lab.offer();
    assert!(
        lab.aborted,
        "an orderly end would make half of it a message"
    );
}
