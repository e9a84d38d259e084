{{/* Names. KubeRay allows a RayService 47 characters (DNS-1035), from which it derives the rest. */}}
{{- define "mell-ray.fullname" -}}
{{- $base := .Values.nameOverride | default .Chart.Name -}}
{{- $given := .Values.fullnameOverride -}}
{{- if not $given -}}
{{- $given = eq $base .Release.Name | ternary $base (printf "%s-%s" .Release.Name $base) -}}
{{- end -}}
{{- $name := $given | lower | replace "." "-" | replace "_" "-" | trimAll "-" -}}
{{- if not (regexMatch "^[a-z]" $name) -}}{{- $name = printf "m-%s" $name -}}{{- end -}}
{{- if or (ne $name $given) (gt (len $name) 47) -}}
{{- /* Two names that had to be changed stay two names. */ -}}
{{- $name = printf "%s-%s" ($name | trunc 38 | trimSuffix "-") ($given | sha256sum | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "mell-ray.serveService" -}}
{{- printf "%s-serve-svc" (include "mell-ray.fullname" .) -}}
{{- end -}}

{{- define "mell-ray.serviceAccountName" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "mell-ray.fullname" . -}}
{{- end -}}
{{- end -}}

{{- define "mell-ray.modelCacheClaim" -}}
{{- if eq .Values.modelCache.type "existingClaim" -}}
{{- .Values.modelCache.existingClaim -}}
{{- else -}}
{{- printf "%s-models" (include "mell-ray.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a release. It never changes, and it is all the labels that pods get:
a label with a version in it would start a second Ray cluster at each upgrade of the chart. */}}
{{- define "mell-ray.selectorLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ include "mell-ray.fullname" . | quote }}
{{- end -}}

{{- define "mell-ray.labels" -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/managed-by" .Release.Service
  "app.kubernetes.io/part-of" "mell-ray" -}}
{{- $selectors := include "mell-ray.selectorLabels" . | fromYaml -}}
{{- toYaml (mergeOverwrite (deepCopy (.Values.commonLabels | default dict)) $own $selectors) -}}
{{- end -}}

{{/* Metadata of an object of the chart: dict "root" $ "name" … ["labels" …] ["annotations" …] */}}
{{- define "mell-ray.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- toYaml (mergeOverwrite (deepCopy (.labels | default dict)) (include "mell-ray.labels" .root | fromYaml)) | nindent 2 }}
{{- with mergeOverwrite (deepCopy (.root.Values.commonAnnotations | default dict)) (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* An image: dict "root" $ "override" {…} */}}
{{- define "mell-ray.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (.override | default dict) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $tag := $image.tag | default (printf "%s-%s" .root.Chart.AppVersion $image.variant) -}}
{{- printf "%s:%s" $image.repository $tag -}}
{{- end -}}
{{- end -}}

{{/* Enabled worker groups as YAML {name: settings}, the defaults filled in. */}}
{{- define "mell-ray.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
{{- if $group -}}
{{- if ne (toString $group.enabled) "false" -}}
{{- $_ := set $groups $name (mergeOverwrite (deepCopy $.Values.workerDefaults) (omit $group "enabled")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{/* Custom Ray resources of a group; the type of its GPUs is one, known before it has a pod. */}}
{{- define "mell-ray.rayResources" -}}
{{- $resources := deepCopy (.rayResources | default dict) -}}
{{- if .acceleratorType -}}
{{- $_ := set $resources (printf "accelerator_type:%s" .acceleratorType) "1" -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Seconds that a stopping ingress gives its streams. */}}
{{- define "mell-ray.ingressDrain" -}}
{{- $ingress := .Values.serve.mell.ingress | default dict -}}
{{- hasKey $ingress "drain_s" | ternary $ingress.drain_s 20 | ceil | int -}}
{{- end -}}

{{/* Secrets with API keys, as YAML {clients: …, operators: …}, and where pods find them. */}}
{{- define "mell-ray.keySecrets" -}}
{{- $secrets := dict -}}
{{- with .Values.apiKeys.clientsSecret }}{{ $_ := set $secrets "clients" . }}{{ end -}}
{{- with .Values.apiKeys.operatorsSecret }}{{ $_ := set $secrets "operators" . }}{{ end -}}
{{- toYaml $secrets -}}
{{- end -}}

{{- define "mell-ray.keysPath" -}}
/etc/mell-ray/keys
{{- end -}}
