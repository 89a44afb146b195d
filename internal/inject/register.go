package inject

import (
	"cmp"
	"context"
	"fmt"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/admission"
)

// ConfigurationName is that of the MutatingWebhookConfiguration.
const ConfigurationName = "isthmus-sidecar-injector"

// Path is where the Injector is mounted.
const Path = "/inject"

// Register creates or updates the MutatingWebhookConfiguration. It is called by
// the leader, and again when the CA bundle changes. Revision is the value of
// istio.io/rev that means us.
func Register(ctx context.Context, client kubernetes.Interface, e admission.Endpoint, revision string) error {
	config, err := e.ClientConfig(Path)
	if err != nil {
		return err
	}
	webhooks := webhooksFor(config, cmp.Or(revision, "default"))
	fresh := &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: admission.Meta(ConfigurationName, "sidecar-injector"), Webhooks: webhooks,
	}
	err = admission.Put(ctx, client.AdmissionregistrationV1().MutatingWebhookConfigurations(), ConfigurationName, fresh,
		func(have *admissionregistrationv1.MutatingWebhookConfiguration) *admissionregistrationv1.MutatingWebhookConfiguration {
			have = have.DeepCopy()
			have.Webhooks = webhooks
			return have
		})
	if err != nil {
		return fmt.Errorf("registering the injection webhook %s: %w", ConfigurationName, err)
	}
	return nil
}

// webhooksFor makes one webhook for each way in which Istio's labels ask for a
// sidecar; a pod matches at most one.
func webhooksFor(client admissionregistrationv1.WebhookClientConfig, revision string) []admissionregistrationv1.MutatingWebhook {
	const in, notIn = metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn
	const missing = metav1.LabelSelectorOpDoesNotExist
	is := func(key string, op metav1.LabelSelectorOperator, values ...string) metav1.LabelSelectorRequirement {
		return metav1.LabelSelectorRequirement{Key: key, Operator: op, Values: values}
	}
	const nsInject = "istio-injection"
	type requirements = []metav1.LabelSelectorRequirement
	ways := []struct {
		name           string
		namespace, pod requirements
	}{
		// The namespace asks by istio-injection, and the pod does not refuse.
		{
			"namespace", requirements{is(nsInject, in, "enabled")},
			requirements{is(labelInject, notIn, "false")},
		},
		// It asks by revision.
		{
			"rev.namespace", requirements{is(labelRevision, in, revision), is(nsInject, missing)},
			requirements{is(labelInject, notIn, "false")},
		},
		// The namespace says nothing, and the pod asks.
		{
			"object", requirements{is(nsInject, missing), is(labelRevision, missing)},
			requirements{is(labelInject, in, "true"), is(labelRevision, missing)},
		},
		// The pod asks by revision.
		{
			"rev.object", requirements{is(nsInject, missing), is(labelRevision, missing)},
			requirements{is(labelInject, notIn, "false"), is(labelRevision, in, revision)},
		},
	}
	fail := admissionregistrationv1.Fail
	none := admissionregistrationv1.SideEffectClassNone
	again := admissionregistrationv1.IfNeededReinvocationPolicy
	equivalent := admissionregistrationv1.Equivalent
	scope := admissionregistrationv1.NamespacedScope
	var list []admissionregistrationv1.MutatingWebhook
	for _, w := range ways {
		// The name of a namespace is a label that the API server sets itself.
		namespace := append(w.namespace, is("kubernetes.io/metadata.name", notIn, ignoredNamespaces...))
		list = append(list, admissionregistrationv1.MutatingWebhook{
			Name: w.name + ".sidecar-injector.isthmus.dev", ClientConfig: client,
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule: admissionregistrationv1.Rule{
					APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: &scope,
				},
			}},
			FailurePolicy: &fail, SideEffects: &none, ReinvocationPolicy: &again, MatchPolicy: &equivalent,
			TimeoutSeconds: ptr(int32(10)), AdmissionReviewVersions: []string{"v1"},
			NamespaceSelector: &metav1.LabelSelector{MatchExpressions: namespace},
			ObjectSelector:    &metav1.LabelSelector{MatchExpressions: w.pod},
		})
	}
	return list
}
