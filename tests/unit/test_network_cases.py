"""What has gone wrong with other sandboxes' networks, case by case, and which test holds that it does not go wrong here.

A case that can't come up here has the words of docs/security.md that say why.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[2]

POLICY, ADDRESSES, HELLO, GUEST = (
    f"tests/unit/test_{name}.py" for name in ("network_policy", "network_addresses", "network_hello", "guest_network")
)
RULES, SUBSTITUTION = "tests/unit/test_network_secrets.py", "tests/unit/test_network_substitution.py"
GATEWAY, FAULTS, EGRESS, SECRETS = (
    f"tests/fake/test_network_{name}.py" for name in ("gateway", "faults", "egress", "secrets")
)
QEMU, HOSTILE, QEMU_SECRETS = (f"tests/qemu/test_{name}.py" for name in ("network", "network_hostile", "secrets"))


@attrs.frozen
class Case:
    """One way in which a network of names and rules can go wrong."""

    number: int
    what: str
    tests: tuple[tuple[str, str], ...] = ()
    says: str = ""
    """What docs/security.md says of what is not prevented, or can't come up."""


_NO_HTTP = "Without secrets no HTTP is read on its way"
_INSIDE_TLS = "Nobody sees what it says inside TLS, such as another `Host`"
_NO_PROXY = "There is no proxy in the guest"

CASES = (
    # Names
    Case(1, "A NUL in a name does not make another name of it.", ((FAULTS, "test_no_name_of_a_guest_gets_into_a_log_as_it_is"), (GUEST, "test_a_name_that_is_no_host_name_is_none"))),
    Case(2, "Control characters, percent signs, '@', brackets and too long labels are no names.", ((POLICY, "test_no_host_names"), (FAULTS, "test_no_name_of_a_guest_gets_into_a_log_as_it_is"), (GUEST, "test_what_deserves_no_answer"))),
    Case(3, "Upper case and a dot at the end make no other name.", ((POLICY, "test_a_rule_has_the_name_as_it_is_compared"), (GUEST, "test_an_ordinary_question"), (QEMU, "test_unmodified_programs_reach_what_the_policy_names_and_nothing_else"))),
    Case(4, "A domain's rule is for what is below it, and for no name that ends like it.", ((POLICY, "test_a_wildcard_is_what_is_below_and_not_the_domain_itself"), (GATEWAY, "test_names_are_looked_up_by_the_policy_first"))),
    Case(5, "A rule for nearly everything is refused.", ((POLICY, "test_what_is_no_rule_is_refused_with_the_reason"),)),
    Case(6, "Names that are not ASCII are refused, with the spelling that is one.", ((POLICY, "test_what_is_no_rule_is_refused_with_the_reason"), (FAULTS, "test_no_name_of_a_guest_gets_into_a_log_as_it_is"))),
    Case(7, "Nothing in a rule means anything but itself.", ((POLICY, "test_what_is_no_rule_is_refused_with_the_reason"),)),
    Case(8, "Nothing allowed is nothing, and can't be written by mistake.", ((POLICY, "test_nothing_allowed_can_not_be_written_by_mistake"), (QEMU, "test_without_a_policy_there_is_no_network"))),
    Case(9, "An address in any spelling is no name.", ((POLICY, "test_no_host_names"), (GATEWAY, "test_names_are_looked_up_by_the_policy_first"))),
    # Addresses
    Case(10, "Private and reserved addresses are not public.", ((ADDRESSES, "test_these_are_not_public"), (GATEWAY, "test_what_may_not_be_connected_to_is_not"))),
    Case(11, "An IPv4 address in an IPv6 one is not public.", ((ADDRESSES, "test_these_are_not_public"), (ADDRESSES, "test_this_machine_in_disguise_is_ours"))),
    Case(12, "Nor is one that leads through a translator or a tunnel.", ((ADDRESSES, "test_these_are_not_public"), (ADDRESSES, "test_this_machine_in_disguise_is_ours"))),
    Case(13, "Metadata services are out of reach, whatever a rule says.", ((ADDRESSES, "test_what_gives_a_machines_credentials_away_is_no_private_network"), (GATEWAY, "test_what_may_not_be_connected_to_is_not"))),
    Case(14, "This machine's own addresses are out of reach.", ((ADDRESSES, "test_an_address_of_an_interface_is_ours"), (ADDRESSES, "test_without_a_descriptor_no_address_passes"), (GATEWAY, "test_private_addresses_take_a_word_and_this_machine_another"))),
    Case(15, "Of a mixed answer the public addresses are used, and without one there is no connection.", ((GATEWAY, "test_names_are_looked_up_by_the_policy_first"), (FAULTS, "test_only_vetted_addresses_are_tried_whichever_is_first_and_dead"))),
    Case(16, "The next address that is tried is a vetted one, too.", ((FAULTS, "test_only_vetted_addresses_are_tried_whichever_is_first_and_dead"), (FAULTS, "test_so_many_addresses_are_tried_and_no_more"))),
    # The resolver
    Case(17, "A name that leads elsewhere the next time does not lead inside.", ((GATEWAY, "test_a_name_that_leads_elsewhere_the_next_time_does_not_lead_inside"),)),
    Case(18, "A guest that edits its list of hosts gains nothing.", ((HOSTILE, "test_root_gains_nothing_and_harms_only_itself"),)),
    Case(19, "A refused name is never asked for outside.", ((GATEWAY, "test_names_are_looked_up_by_the_policy_first"), (FAULTS, "test_no_name_of_a_guest_gets_into_a_log_as_it_is"))),
    Case(20, "Names below an allowed domain are limited in number, and in how often they are asked for.", ((GATEWAY, "test_so_many_names_below_a_wildcard_and_no_more"), (GATEWAY, "test_a_flood_of_requests_is_let_through_slowly"))),
    Case(21, "Other records than addresses are never given.", ((EGRESS, "test_a_name_that_there_is_has_an_address_of_ours_and_nothing_else"), (EGRESS, "test_all_kinds_of_records_have_the_same_code"))),
    Case(22, "Queries of every wrong shape, over UDP and TCP, end nothing.", ((GUEST, "test_what_deserves_no_answer"), (GUEST, "test_any_bytes_are_a_question_or_none"), (GUEST, "test_other_operations_and_classes_are_not_supported"), (EGRESS, "test_names_over_tcp_one_after_the_other"), (EGRESS, "test_junk_has_no_answer_and_ends_nothing"))),
    Case(23, "No other resolver can be asked.", ((HOSTILE, "test_root_gains_nothing_and_harms_only_itself"), (QEMU, "test_unmodified_programs_reach_what_the_policy_names_and_nothing_else"))),
    Case(24, "An alias that leads inside is an address that leads inside.", ((GATEWAY, "test_what_may_not_be_connected_to_is_not"),), "only the addresses at their end count"),
    Case(25, "The guest's own addresses mean one name or none, and no other port than was asked for.", ((GUEST, "test_what_is_forgotten_means_nothing_and_is_not_used_again_soon"), (GUEST, "test_addresses_begin_anew_after_the_last"), (EGRESS, "test_an_address_that_means_no_name_is_refused_and_asks_nobody"), (GATEWAY, "test_what_may_not_be_connected_to_is_not"))),
    Case(26, "A slow resolver stalls its own sandbox only, and an answer that comes after a change of policy is not given.", ((FAULTS, "test_a_slow_resolver_stalls_only_the_lookups_of_its_own_sandbox"), (FAULTS, "test_a_lookup_has_so_long"), (FAULTS, "test_an_answer_that_comes_after_the_policy_has_changed_is_not_given"), (EGRESS, "test_an_answer_that_comes_after_the_policy_has_changed_is_not_kept"))),
    # TLS
    Case(27, "An allowed server name at an address of the guest's choice is not possible: it has no addresses.", ((GATEWAY, "test_on_port_443_the_guest_must_name_whom_it_asked_for"), (HOSTILE, "test_root_gains_nothing_and_harms_only_itself"))),
    Case(28, "Without a server name, with two or with an address nothing goes on.", ((HELLO, "test_a_hello_without_a_name_says_so"), (HELLO, "test_what_leaves_any_doubt_about_the_name_is_refused"), (GATEWAY, "test_on_port_443_the_guest_must_name_whom_it_asked_for"))),
    Case(29, "A hello in pieces is read, and an endless one ends.", ((HELLO, "test_the_name_is_found_however_it_comes"), (HELLO, "test_an_endless_hello_ends"), (HELLO, "test_a_hello_that_is_too_long_ends_though_it_has_come_at_once"), (GATEWAY, "test_the_right_name_goes_through_in_pieces_and_the_server_may_speak_first"))),
    Case(30, "Encrypted hellos: the outer name counts, and no key is given.", ((EGRESS, "test_a_name_that_there_is_has_an_address_of_ours_and_nothing_else"),), "DNS records that would offer keys for them are never given"),
    Case(31, "Another Host inside TLS is not seen, but where secrets are.", ((SECRETS, "test_what_does_not_go_on"),), _INSIDE_TLS),
    Case(32, "Several hosts on one connection are not told apart, but where secrets are: there HTTP/2 is not offered.", ((SECRETS, "test_a_client_that_speaks_only_http_2_gets_no_other_than_1"),), "if a site serves several names from one server, all of them can be reached"),
    Case(33, "A second request on a connection goes where the first went, and with secrets is looked at like the first.", ((SECRETS, "test_the_second_request_of_a_connection_is_looked_at_as_well"),), _NO_HTTP),
    Case(34, "What is no TLS on port 443 does not go on; elsewhere the server may speak first.", ((GATEWAY, "test_on_port_443_the_guest_must_name_whom_it_asked_for"), (GATEWAY, "test_the_right_name_goes_through_in_pieces_and_the_server_may_speak_first"), (HELLO, "test_what_is_no_tls_says_so"))),
    # HTTP
    Case(35, "Port 80 is decided by name like any other.", ((GATEWAY, "test_what_may_not_be_connected_to_is_not"), (QEMU, "test_unmodified_programs_reach_what_the_policy_names_and_nothing_else"))),
    Case(36, "There is no CONNECT that could be decided otherwise.", (), _NO_PROXY),
    Case(37, "Requests and answers that two readers understand differently are refused where they are read.", ((SECRETS, "test_what_does_not_go_on"), (SECRETS, "test_answers_that_are_none"), (SECRETS, "test_more_than_an_answer_is_no_answer_to_the_next_request"), (SECRETS, "test_of_what_a_guest_sent_little_is_told")), _NO_HTTP),
    Case(38, "A URL for another site in a request, two Hosts or none.", ((SECRETS, "test_what_does_not_go_on"),), _NO_PROXY),
    Case(39, "Headers between hops end here, and answers that switch protocols, where secrets are.", ((SECRETS, "test_the_server_gets_the_value_and_the_guest_has_the_placeholder"), (SECRETS, "test_answers_that_are_none")), _NO_HTTP),
    Case(40, "No loop to this process and no service of this machine.", ((GATEWAY, "test_private_addresses_take_a_word_and_this_machine_another"), (ADDRESSES, "test_an_address_of_an_interface_is_ours")), _NO_PROXY),
    Case(41, "A redirect is a new name.", ((GATEWAY, "test_names_are_looked_up_by_the_policy_first"),), "a redirect to another host is a new name, and decided as one"),
    Case(42, "There are no rules about paths.", (), _NO_HTTP),
    # Secrets
    Case(43, "A placeholder goes to another host as it is.", ((SECRETS, "test_other_hosts_get_the_placeholder_as_it_is"), (QEMU_SECRETS, "test_programs_use_a_secret_that_the_machine_does_not_have"))),
    Case(44, "A placeholder in pieces is one, in headers only; a value in pieces or encoded is found, and no compressed or partial answer asked for.", ((SECRETS, "test_a_head_in_pieces_has_the_value_in_its_place"), (SECRETS, "test_placeholders_stay_in_what_is_no_header"), (SUBSTITUTION, "test_substitution_in_headers"), (SECRETS, "test_a_value_is_filtered_that_comes_in_pieces_and_encoded"), (SECRETS, "test_a_value_is_filtered_that_a_server_has_encoded"), (SUBSTITUTION, "test_pieces_make_no_difference"), (SECRETS, "test_what_the_guest_sends_decides_nothing_about_how_the_answer_is_encoded"), (SECRETS, "test_a_client_that_speaks_only_http_2_gets_no_other_than_1")), "a server that encodes a value and hands it back gives it away"),
    Case(45, "A value can be no second header, and is in no answer, log, event, memory or file of a guest.", ((RULES, "test_what_can_be_no_rule_with_secrets"), (RULES, "test_a_rule_keeps_its_values_to_itself"), (SECRETS, "test_the_server_gets_the_value_and_the_guest_has_the_placeholder"), (SECRETS, "test_answers_that_are_none"), (QEMU_SECRETS, "test_programs_use_a_secret_that_the_machine_does_not_have"))),
    Case(46, "The server's certificate is verified first, and secrets are for hosts that are named.", ((SECRETS, "test_a_server_with_a_wrong_certificate_gets_nothing"), (QEMU_SECRETS, "test_a_host_with_a_wrong_certificate_gets_nothing"), (RULES, "test_policies_that_would_give_a_secret_away_or_not_use_it"))),
    # Lifecycle and resources
    Case(47, "A policy stays in force in copies, and where a machine sleeps or goes back.", ((QEMU, "test_copies_and_moves_of_the_machine_break_connections_off_and_can_make_new_ones"), (GATEWAY, "test_a_copy_has_the_policy_in_force_and_nothing_else"), (QEMU, "test_without_a_policy_there_is_no_network"))),
    Case(48, "A change of policy breaks off what it allowed, also what waits.", ((GATEWAY, "test_a_policy_for_a_block_ends_with_its_connections"), (FAULTS, "test_what_waits_for_room_ends_with_its_policy_and_is_never_dialled"), (FAULTS, "test_an_end_at_any_moment_leaves_nothing"))),
    Case(49, "Connections, descriptors, resets and slow readers are bounded, and one's own.", ((GATEWAY, "test_so_many_connections_at_a_time_and_others_wait"), (EGRESS, "test_without_descriptors_accepting_waits_and_goes_on"), (EGRESS, "test_so_many_connections_and_no_more"), (GATEWAY, "test_a_reset_is_a_reset_both_ways"), (GATEWAY, "test_an_answer_comes_after_the_guest_has_ended"), (FAULTS, "test_what_this_machine_lacks_is_an_answer_and_no_bug"), (FAULTS, "test_many_connections_to_silent_addresses_take_few_descriptors"), (QEMU, "test_hundreds_of_connections_leave_nothing"))),
    Case(50, "What does not go by TCP to a name fails at once.", ((HOSTILE, "test_root_gains_nothing_and_harms_only_itself"), (QEMU, "test_unmodified_programs_reach_what_the_policy_names_and_nothing_else"))),
    Case(51, "A proxy's answers are bounded, and say no more than a status.", ((GATEWAY, "test_what_a_proxy_says_is_told_to_the_guest"),)),
    Case(52, "Root in the guest takes its side of the network apart, and gains nothing.", ((HOSTILE, "test_root_gains_nothing_and_harms_only_itself"), (EGRESS, "test_an_interface_that_is_down_ends_nothing"))),
    Case(53, "One sandbox's names and answers are of no use in another.", ((FAULTS, "test_a_slow_resolver_stalls_only_the_lookups_of_its_own_sandbox"), (GATEWAY, "test_a_copy_has_the_policy_in_force_and_nothing_else")), "means something in that guest only"),
    Case(54, "Nothing that a guest writes gets into a log as it is, and not without end.", ((FAULTS, "test_no_name_of_a_guest_gets_into_a_log_as_it_is"), (FAULTS, "test_a_guest_fills_no_log"), (HELLO, "test_what_leaves_any_doubt_about_the_name_is_refused"))),
)  # fmt: skip


@cache
def names_of_tests(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_a_case_is_held_by_tests_or_a_sentence(case: Case) -> None:
    assert case.tests or case.says
    assert [name for path, name in case.tests if name not in names_of_tests(path)] == []
    assert case.says in " ".join((ROOT / "docs/security.md").read_text(encoding="utf-8").split())


def test_no_case_is_missing() -> None:
    assert [case.number for case in CASES] == list(range(1, 55))
