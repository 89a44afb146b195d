package kube

import "testing"

func TestScopeOf(t *testing.T) {
	for annotation, want := range map[string]string{
		"": "", "{proxyMetadata: {ISTHMUS_SCOPE: on-demand}}": "on-demand", "proxyMetadata:\n  A: b\n  ISTHMUS_SCOPE: full\n": "full",
		"{proxyMetadata: {ISTHMUS_SCOPE: nonsense}}": "", "ISTHMUS_SCOPE: on-demand": "", "{ISTHMUS_SCOPE": "", "concurrency: 2": "",
	} {
		if got := scopeOf(map[string]string{annotationProxyConfig: annotation}); got != want {
			t.Errorf("%q: got %q, want %q", annotation, got, want)
		}
	}
}
