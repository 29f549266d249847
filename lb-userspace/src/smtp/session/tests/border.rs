//! STARTTLS (RFC 3207), what may come before it and what survives it.

use super::*;

#[test]
fn require_serves_only_what_leads_to_tls() {
    let mut lab = Lab::new(REQUIRE);
    lab.refused("MAIL FROM:<a@b>\r\n", "530 5.7.0 Must issue");
    lab.sends("EHLO c.example\r\n");
    lab.says(CAPABLE);
    let shown = "250-mx1\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-SIZE 1000\r\n250 STARTTLS\r\n";
    assert_eq!(lab.heard(), shown);
    lab.reached();
    for command in [
        "MAIL FROM:<a@b>",
        "RCPT TO:<c@d>",
        "DATA",
        "AUTH PLAIN AGEAYg==",
        "VRFY a",
        "ETRN x",
        "FOO",
    ] {
        lab.refused(
            &format!("{command}\r\n"),
            "530 5.7.0 Must issue a STARTTLS command first\r\n",
        );
    }
    lab.refused("BDAT 6 LAST\r\nQUIT\r\n", "530 5.7.0 ");
    for command in ["NOOP", "RSET", "HELP", "helo c", "QUIT"] {
        lab.exchange(&format!("{command}\r\n"), "250 ok\r\n");
    }
    assert_eq!(lab.end, Some(End::Quit));
}

#[test]
fn a_session_through_the_border() {
    let mut lab = Lab::greeted(REQUIRE);
    lab.cross();
    assert_eq!(lab.connects, 1, "the member saw nothing but EHLO");
    lab.refused("RCPT TO:<c@d>\r\n", "503 ");
    lab.refused("MAIL FROM:<a@b>\r\n", "503 ");
    lab.sends("EHLO again.example\r\n");
    assert_eq!(lab.reached(), "EHLO again.example\r\n");
    lab.says(CAPABLE);
    assert_eq!(
        lab.heard(),
        "250-mx1\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-AUTH PLAIN\r\n250 SIZE 1000\r\n"
    );
    lab.refused("STARTTLS\r\n", "503 5.5.1 ");
    lab.exchange("AUTH PLAIN AGEAYg==\r\n", "235 in\r\n");
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    let facts = lab.session.facts();
    assert!(facts.starttls_offered && facts.starttls_used && lab.session.is_tls());
    assert_eq!(facts.helo.as_deref(), Some(&b"again.example"[..]));
}

#[test]
fn starttls_is_asked_for_properly_or_refused() {
    let mut lab = Lab::new(REQUIRE);
    lab.refused("STARTTLS\r\n", "503 ");
    lab.exchange("HELO c\r\n", "250 mx1\r\n");
    lab.refused("STARTTLS\r\n", "503 ");
    lab.ehlo();
    lab.refused("STARTTLS now\r\n", "501 5.5.4 ");
    assert!(!lab.border);
    lab.cross();
}

#[test]
fn bytes_behind_starttls_end_the_session() {
    for security in [REQUIRE, ALLOW] {
        for behind in [
            "MAIL FROM:<evil@x>\r\n",
            "\r\n",
            "x",
            "\x16\x03\x01\0",
            "RSET\nQUIT\r\n",
        ] {
            let mut lab = Lab::greeted(security);
            lab.sends(format!("STARTTLS\r\n{behind}"));
            assert!(lab.heard().starts_with("554 5.5.1 "), "{behind:?}");
            assert_eq!(
                (lab.end, lab.reached().as_str()),
                (Some(End::StartTlsInjection), "")
            );
            assert_eq!(lab.session.facts().ended_in, Some(Phase::StartTls));
            assert!(!lab.border);

            // In a later segment, but before the shell has said 220.
            let mut lab = Lab::greeted(security);
            lab.sends("STARTTLS\r\n");
            assert!(lab.border);
            lab.sends(behind);
            assert!(lab.heard().starts_with("554 5.5.1 "), "{behind:?}");
            assert_eq!(
                (lab.end, lab.reached().as_str()),
                (Some(End::StartTlsInjection), "")
            );
            assert!(!lab.session.open_border(lab.now));
        }
    }
}

#[test]
fn starttls_waits_for_what_was_asked_before() {
    let mut lab = Lab::greeted(ALLOW);
    lab.sends("MAIL FROM:<a@b>\r\nSTARTTLS\r\n");
    assert!(!lab.border);
    lab.sends("x");
    lab.says("250 ok\r\n");
    assert!(lab.heard().starts_with("250 ok\r\n554 "));
    assert_eq!(lab.end, Some(End::StartTlsInjection));
}

#[test]
fn a_member_that_is_left_within_a_message_sees_no_end() {
    let mut lab = Lab::greeted(ALLOW);
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("BDAT 4\r\nhalf", "250 ok\r\n");
    lab.cross();
    assert_eq!((lab.aborted, lab.connects), (true, 2));
    // Its greeting is nothing that the client waits for.
    lab.session.member_connected(OWN, lab.now);
    lab.says("554 no\r\n");
    lab.session.no_member();
    lab.offer();
    assert_eq!(lab.heard(), "421 4.3.2 No mail server available\r\n");
}

#[test]
fn a_session_that_ends_at_the_border_within_a_message_shows_no_end_either() {
    for end in [Session::cut as fn(&mut Session), |session| {
        session.drain(Instant::now());
    }] {
        let mut lab = Lab::greeted(ALLOW);
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        lab.exchange("BDAT 4\r\nhalf", "250 ok\r\n");
        lab.sends("STARTTLS\r\n");
        assert!(lab.session.open_border(lab.now));
        lab.offer();
        // Nobody has carried out what the border asks for.
        lab.session.tls_established(lab.now);
        end(&mut lab.session);
        lab.offer();
        assert_eq!((lab.aborted, lab.end), (true, Some(End::Drained)));
    }
}

#[test]
fn no_envelope_and_no_identity_survive_the_border() {
    for (command, reply) in [
        ("MAIL FROM:<a@b>\r\n", "250 ok\r\n"),
        ("AUTH PLAIN AGEAYg==\r\n", "235 in\r\n"),
    ] {
        let mut lab = Lab::greeted(ALLOW);
        lab.exchange(command, reply);
        lab.cross();
        assert_eq!(lab.connects, 2, "a member that knows nothing");
        lab.session.member_connected(OWN, lab.now);
        lab.sends("EHLO c\r\n");
        assert_eq!(lab.reached(), "", "its greeting is awaited");
        lab.says("220 mx2\r\n");
        assert_eq!(lab.heard(), "", "and not shown");
        assert_eq!(lab.reached(), "EHLO c\r\n");
        lab.says("250 mx2\r\n");
        assert_eq!(lab.heard(), "250 mx2\r\n");
        lab.exchange("RCPT TO:<c@d>\r\n", "503 need MAIL\r\n");
    }
}

#[test]
fn allow_serves_clients_that_stay_in_plaintext() {
    let mut lab = Lab::new(ALLOW);
    lab.sends("EHLO c\r\n");
    lab.says(CAPABLE);
    assert!(
        lab.heard()
            .ends_with("250-AUTH PLAIN\r\n250-SIZE 1000\r\n250 STARTTLS\r\n")
    );
    lab.reached();
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("RCPT TO:<c@d>\r\n", "250 ok\r\n");
    lab.exchange("DATA\r\n", "354 go\r\n");
    lab.exchange("x\r\n.\r\n", "250 ok\r\n");
    assert!(!lab.session.facts().starttls_used);
}

#[test]
fn a_client_that_vanishes_at_the_border_frees_its_member() {
    let mut lab = Lab::greeted(REQUIRE);
    lab.sends("STARTTLS\r\n");
    lab.session.client_closed(lab.now);
    lab.offer();
    assert_eq!(lab.end, Some(End::ClientClosed));
    assert!(!lab.session.open_border(lab.now));
}
